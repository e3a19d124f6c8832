"""Local servers end with the run that started them, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from common.errors import RewardUnavailable
from common.project_files import PROJECT_ROOT
from common.rewards.api import INFO_PATH, READY_PATH, ServerInfo
from common.types import Precision
from learner.driver.local_servers import RESTARTS, LocalServers, LocalServerSpec
from tests.helpers.tiny_rewards import write_hps
from tests.helpers.waiting import wait_until

DEADLINE = 60.0
BRIGHTNESS = LocalServerSpec("brightness", "tests.helpers.toy_scorers:BrightnessScorer", None)

LAUNCHER = """
import signal, sys, time
from pathlib import Path
from learner.driver.local_servers import LocalServers, LocalServerSpec
# Whoever runs the tests in the background has them, and so this, ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
specs = [LocalServerSpec(name, "tests.helpers.toy_scorers:BrightnessScorer", None) for name in ("one", "two")]
with LocalServers(specs, Path(sys.argv[1])) as servers:
    print(*servers.urls.values(), flush=True)
    time.sleep(600)
"""


def gone(url: str) -> bool:
    try:
        httpx.get(url + READY_PATH)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        return False  # on its way
    return False


def test_servers_answer_inside_the_block_and_are_gone_after_it(tmp_path: Path) -> None:
    specs = [BRIGHTNESS, LocalServerSpec("twin", BRIGHTNESS.scorer, None)]
    with LocalServers(specs, tmp_path / "logs") as servers:
        urls = dict(servers.urls)
        assert list(urls) == ["brightness", "twin"]
        assert all(httpx.get(url + READY_PATH).json()["ready"] for url in urls.values())
        servers.check()
    assert all(gone(url) for url in urls.values())
    said = (tmp_path / "logs" / "reward_brightness.log").read_text()
    assert said == f"loading {BRIGHTNESS.scorer}\nbrightness is ready at {urls['brightness']}\n"


def test_rewards_on_one_gpu_share_a_process_and_each_has_a_url(tmp_path: Path) -> None:
    """This scorer needs no GPU, whatever it is told. It has the default precision of GPUs, or the chosen one."""
    choosy = LocalServerSpec("twin", "tests.helpers.toy_scorers:ChoosyScorer", None, device="cuda:0")
    specs = [replace(choosy, name="brightness", device="cuda"), replace(choosy, precision=Precision.FLOAT16)]
    with LocalServers(specs, tmp_path) as servers:
        base = servers.urls["brightness"].removesuffix("/brightness")
        assert servers.urls == {"brightness": f"{base}/brightness", "twin": f"{base}/twin"}
        infos = {name: ServerInfo.from_json(httpx.get(url + INFO_PATH).content) for name, url in servers.urls.items()}
        assert [(info.scorer, info.precision) for info in infos.values()] == [
            ("brightness", "bfloat16"),
            ("twin", "float16"),
        ]
        (process,) = servers._processes.values()
        process.kill()
        process.wait(DEADLINE)
        with pytest.raises(RewardUnavailable, match="the local reward server brightness ended with exit status -9"):
            servers.check()
        servers.keep_up({"twin"})
        wait_until(lambda: not gone(servers.urls["twin"]), "both rewards to answer again")
        assert len(servers._processes) == 1


def test_packages_named_as_ours_in_the_current_directory_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a scorer in that directory is still found."""
    for name in ("common", "reward_servers", "numpy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('another project')")
    (tmp_path / "my_rewards.py").write_text("from tests.helpers.toy_scorers import BrightnessScorer as Mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with LocalServers([LocalServerSpec("mine", "my_rewards:Mine", None)], tmp_path / "logs") as servers:
        assert httpx.get(servers.urls["mine"] + READY_PATH).json()["ready"]


def test_an_exception_in_the_block_stops_them(tmp_path: Path) -> None:
    urls: list[str] = []

    def interrupted_run() -> None:
        with LocalServers([BRIGHTNESS], tmp_path) as servers:
            urls.extend(servers.urls.values())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    assert gone(urls[0])


def test_one_that_does_not_start_stops_the_others_and_quotes_its_log(tmp_path: Path) -> None:
    weights = write_hps(tmp_path / "hps") / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    servers = LocalServers([BRIGHTNESS, LocalServerSpec("hps", "hps", tmp_path / "hps")], tmp_path)
    with pytest.raises(
        RewardUnavailable, match=r"hps did not start.*\n    loading hps\n    reward_servers: .*truncated or corrupt"
    ) as caught:
        servers.__enter__()
    assert (caught.value.reward, caught.value.cause) == ("hps", "start")
    assert servers.urls == {}


def test_one_that_takes_too_long_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RewardUnavailable, match=r"was not ready within 0\.01 s"):
        LocalServers([BRIGHTNESS], tmp_path, ready_timeout_s=0.01).__enter__()


def test_a_death_is_noticed(tmp_path: Path) -> None:
    with LocalServers([BRIGHTNESS], tmp_path) as servers:
        servers._processes["brightness"].kill()
        servers._processes["brightness"].wait(DEADLINE)
        with pytest.raises(RewardUnavailable, match="ended with exit status -9") as caught:
            servers.check()
    assert caught.value.cause == "died"


def test_a_dead_server_is_started_again_at_its_port_and_not_for_ever(tmp_path: Path) -> None:
    said: list[str] = []
    restarted: list[str] = []
    with LocalServers([BRIGHTNESS], tmp_path, say=said.append, restarted=restarted.append) as servers:
        servers.keep_up()
        url, first = servers.urls["brightness"], servers._processes["brightness"]
        for death in range(RESTARTS):
            kill(servers)
            servers.keep_up({"another"})
            wait_until(lambda: not gone(url), "the server to answer again")
            assert len(said) == death + 1
        assert restarted == ["brightness"] * RESTARTS
        assert said[0] == "the local reward server brightness ended with exit status -9: it is started again"
        assert servers._processes["brightness"].pid != first.pid
        kill(servers)
        servers.keep_up({"another"})  # nobody needs it
        with pytest.raises(
            RewardUnavailable, match=r"for the 4th time in 10 minutes; the end of .*log:\n.*is ready at"
        ):
            servers.keep_up({"brightness"})


def kill(servers: LocalServers) -> None:
    servers._processes["brightness"].kill()
    servers._processes["brightness"].wait(DEADLINE)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_servers_end_with_their_launcher(tmp_path: Path, number: signal.Signals) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path)],
        cwd=PROJECT_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with launcher:
        urls = launcher.stdout.readline().split()
        assert len(urls) == 2
        assert not any(gone(url) for url in urls)
        os.kill(launcher.pid, number)
        launcher.wait(DEADLINE)
        for url in urls:
            wait_until(lambda url=url: gone(url))
