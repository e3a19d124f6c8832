"""The live page's server: what it shows, to whom, and what it refuses."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common.config.run import DashboardConfig
from common.errors import ConfigError
from learner.records.live_page import DASHBOARD_TOKEN, live_page, main, page_of_run
from learner.records.live_server import MOST_CONNECTIONS
from tests.helpers.run_directory import record, write_group, write_run
from tests.helpers.waiting import wait_until

TOKEN = "0123456789abcdef"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DASHBOARD_TOKEN, raising=False)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", finished=False)


@pytest.fixture
def page(run_dir: Path) -> Iterator[httpx.Client]:
    with live_page(run_dir, "127.0.0.1", 0, "dashboard") as url, httpx.Client(base_url=url) as client:
        yield client


def sections(client: httpx.Client, **have: str) -> dict[str, dict[str, str]]:
    answer = client.get("/sections", params={"have": json.dumps(have)})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_the_page_shows_the_run(page: httpx.Client) -> None:
    whole = page.get("/")
    assert "<title>run, live</title>" in whole.text
    assert whole.headers["content-security-policy"].startswith("default-src 'none'")
    assert "fetch(" in page.get("/page.js").text
    found = sections(page)
    assert "20 of 40 iterations" in found["now"]["markup"]
    assert "about 20 s left in this stage" in found["now"]["markup"]
    assert "alignment, iteration 10" in found["groups"]["markup"].lower()
    assert "Newest pictures" in found["pictures"]["markup"]
    assert found["curves"]["markup"].count("<svg") == 6
    assert "<script>" not in "".join(section["markup"] for section in found.values())


def test_only_what_has_changed_is_sent_again(page: httpx.Client, run_dir: Path) -> None:
    before = sections(page)
    have = {name: section["stamp"] for name, section in before.items()}
    assert set(sections(page, **have)) <= {"now"}  # the age of the newest record
    write_group(run_dir, 20)
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as more:
        more.write(record("alignment", 20, time=1.8e9 + 99, **{"reward/hps": 0.9}) + "\n")
    changed = sections(page, **have)
    assert "21 of 40 iterations" in changed["now"]["markup"]
    assert "iteration 20" in changed["groups"]["markup"]
    assert "result" not in changed


def test_a_group_has_its_samples_scores_advantages_and_steps(page: httpx.Client) -> None:
    text = page.get("/group", params={"name": "alignment-000010", "place": "1"}).text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in text
    assert text.index("+1.500") < text.index("-1.500")
    assert "Sample 3, not trained on" in text
    assert text.count("<li class=trained>") == 2
    assert "trained by policy gradient" in text
    assert "trained by final-step terms" in text
    cards = page.get("/groups", params={"name": "alignment-000000"}).text
    assert cards.count('class="group card"') == 2
    strip = page.get("/pictures/groups/alignment-000010-00.png")
    assert (strip.status_code, strip.headers["content-type"]) == (200, "image/png")


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("/group?name=alignment-000010&place=2", 500, "there is no group 2"),
        ("/group?name=alignment-000010&place=x", 500, "there is no group -1"),
        ("/group?name=../../config&place=0", 500, "no groups of this iteration"),
        ("/groups", 500, "no groups of this iteration"),
        ("/pictures/..%2Fconfig.yaml", 404, "no such page"),
        ("/pictures/policies/rtdmd.json", 404, "no such page"),
        ("/pictures/groups/alignment-000010.json", 404, "no such page"),
        ("/config.yaml", 404, "no such page"),
        ("/sections?have=[1]", 200, "now"),
        ("/sections?have=nonsense", 200, "now"),
    ],
)
def test_what_is_not_there_is_told(page: httpx.Client, path: str, status: int, told: str) -> None:
    answer = page.get(path)
    assert answer.status_code == status
    assert told in answer.text


def test_damage_is_told_on_the_page(page: httpx.Client, run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text("nonsense\n" + record("alignment", 0) + "\n", encoding="utf-8")
    found = sections(page)
    assert "line 1 is not a metrics record" in found["now"]["markup"]
    assert "Newest pictures" in found["pictures"]["markup"]


def test_a_finished_run_that_goes_on_is_not_called_finished(page: httpx.Client, run_dir: Path) -> None:
    (run_dir / "summary.json").write_text('{"policies": {}}', encoding="utf-8")
    assert "The run has finished" in sections(page)["now"]["markup"]
    later = (run_dir / "summary.json").stat().st_mtime + 5
    os.utime(run_dir / "metrics.jsonl", (later, later))
    assert "The run has finished" not in sections(page)["now"]["markup"]


def test_a_run_that_has_only_begun_is_shown(tmp_path: Path) -> None:
    with live_page(tmp_path, "127.0.0.1", 0, "dashboard") as url, httpx.Client(base_url=url) as client:
        assert "No iteration yet" in sections(client)["now"]["markup"]


def test_an_open_page_answers_only_to_names_of_this_machine(page: httpx.Client) -> None:
    answer = page.get("/", headers={"host": "attacker.example"})
    assert answer.status_code == 403
    assert "open to this machine alone" in answer.text
    assert page.post("/token", headers={"host": "attacker.example"}).status_code == 403
    assert page.post("/token", data={"token": TOKEN}).status_code == 404
    assert page.get("/", headers={"host": "localhost:1234"}).status_code == 200


def test_with_a_token_nothing_is_shown_without_it(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DASHBOARD_TOKEN, TOKEN)
    with live_page(run_dir, "127.0.0.1", 0, "dashboard") as url, httpx.Client(base_url=url) as client:
        asked = client.get("/")
        assert asked.status_code == 401
        assert 'type="password"' in asked.text
        assert "run, live" not in asked.text
        assert client.get("/sections").status_code == 401
        assert client.get("/pictures/policies/rtdmd-00.png").status_code == 401
        assert client.get("/", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/", headers={"cookie": "rtdmd_page_1=x; ==;"}).status_code == 401
        assert client.get("/", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
        refused = client.post("/token", data={"token": "wrong"})
        assert (refused.status_code, "This is not the token" in refused.text) == (401, True)
        assert client.post("/token", data={"token": "x" * 5000}).status_code == 404
        entered = client.post("/token", data={"token": TOKEN})
        assert entered.status_code == 303
        assert TOKEN not in entered.headers["set-cookie"]
        assert "HttpOnly; SameSite=Strict" in entered.headers["set-cookie"]
        assert "run, live" in client.get("/").text


@pytest.mark.parametrize(
    ("host", "token", "message"),
    [
        ("0.0.0.0", None, "dashboard.host = 0.0.0.0 is reachable from other machines: set RTDMD_DASHBOARD_TOKEN"),
        ("0.0.0.0", "short", "RTDMD_DASHBOARD_TOKEN is too short for 0.0.0.0"),
        ("http://here", None, "dashboard.host = 'http://here': not a host alone"),
    ],
)
def test_other_machines_need_a_token(
    tmp_path: Path, host: str, token: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token is not None:
        monkeypatch.setenv(DASHBOARD_TOKEN, token)
    with pytest.raises(ConfigError, match=message), live_page(tmp_path, host, 0, "dashboard"):
        pass


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = rf"dashboard\.port = {port}: cannot listen on 127\.0\.0\.1:{port} \(Address already in use\): choose"
        with pytest.raises(ConfigError, match=told), live_page(tmp_path, "127.0.0.1", port, "dashboard"):
            pass


def test_many_connections_do_not_take_the_page(page: httpx.Client) -> None:
    place = (page.base_url.host, page.base_url.port or 0)
    idle = [socket.create_connection(place) for _ in range(MOST_CONNECTIONS)]
    further = socket.create_connection(place)
    further.settimeout(30)
    assert further.recv(1) == b""
    for connection in (*idle, further):
        connection.close()

    def answers() -> bool:
        try:
            return page.get("/").status_code == 200
        except httpx.TransportError:
            return False

    wait_until(answers)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "not the directory of a run: it has neither config.yaml nor metrics.jsonl"),
        (["--port", "70000"], "--port 70000: a port is from 0 to 65535"),
        (["--host", "0.0.0.0"], "watch.host = 0.0.0.0 is reachable from other machines"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_run(tmp_path / "run", iterations=1) if arguments else tmp_path
    assert main([str(directory), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error


def test_a_run_has_a_page_if_it_asks_for_one(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with page_of_run(run_dir, DashboardConfig()):
        assert caplog.messages == []
    with page_of_run(run_dir, DashboardConfig(port=0)):
        (told,) = caplog.messages
        assert "run, live" in httpx.get(told.removeprefix("live page: ")).text
