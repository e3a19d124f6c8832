"""No client of ours gives a request to this machine, or its token, to a proxy. Others are reached as configured."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from common.errors import ModelError, RewardUnavailable
from common.rewards.http import Exchange, RewardHttp, _tls
from common.rewards.proxies import trusts_environment, unreachable
from reward_servers import score_images
from reward_servers.scorers.vlm_judge.client import VllmClient
from reward_servers.scorers.vlm_judge.judge import _http_of_url
from tests.helpers.fake_reward_server import closed_url, fake_server

PROJECT_ROOT = Path(__file__).resolve().parents[4]
TOKEN = "open sesame, 16 or more"
ELSEWHERE = "http://reward.invalid:8000"


@contextmanager
def proxy() -> Iterator[tuple[str, list[str]]]:
    """A proxy that answers 502; the list has the first line of every request."""
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(65_536).split(b"\r\n")[0].decode())
                    connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

        thread = Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The requests that reach the proxy of the environment."""
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "http_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with proxy() as (url, requests):
        monkeypatch.setenv("HTTP_PROXY", url)
        monkeypatch.setenv("REWARD_SERVER_TOKEN", TOKEN)
        yield requests


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    return str(path)


def test_the_client_of_a_run(asked: list[str]) -> None:
    http = RewardHttp(TOKEN)
    try:
        with fake_server() as server:
            assert http.get(Exchange("fake", server.url, 5.0), "/v1/info", len) > 0
        assert asked == []
        with pytest.raises(RewardUnavailable, match="502"):
            http.get(Exchange("fake", ELSEWHERE, 5.0), "/v1/info", len)
    finally:
        http.close()
    assert asked == [f"GET {ELSEWHERE}/v1/info HTTP/1.1"]


def test_the_command_score(asked: list[str], image: str, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server() as server:
        score_images.main(["--url", server.url, image, "--prompt", "a"])
        assert len(server.bodies) == 1
    assert asked == []
    assert score_images.main(["--url", ELSEWHERE, image, "--prompt", "a"]) == 2
    assert "answered 502" in capsys.readouterr().err
    assert asked == [f"POST {ELSEWHERE}/v1/score HTTP/1.1"]


def test_certificates_that_are_not_there_are_named_and_no_matter_here(
    asked: list[str], image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "gone.pem"))
    _tls.cache_clear()  # a process has one environment
    http = RewardHttp(None)
    try:
        with fake_server() as server:
            assert http.get(Exchange("fake", server.url, 5.0), "/v1/info", len) > 0
        with pytest.raises(RewardUnavailable, match=r"certificates of SSL_CERT_FILE .* cannot be read"):
            http.get(Exchange("fake", ELSEWHERE, 5.0), "/v1/info", len)
    finally:
        http.close()
    assert score_images.main(["--url", ELSEWHERE, image, "--prompt", "a"]) == 2
    assert "certificates of SSL_CERT_FILE" in capsys.readouterr().err
    assert asked == []


def test_a_judge_given_by_url(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    with fake_server() as server, _http_of_url(server.url) as http:
        http.get("/v1/models")
        assert server.authorization == "Bearer secret"
    assert asked == []
    with _http_of_url(ELSEWHERE) as http:
        assert http.get("/v1/models").status_code == 502
    assert asked == [f"GET {ELSEWHERE}/v1/models HTTP/1.1"]


def test_the_example(asked: list[str], image: str) -> None:
    def run(url: str) -> str:
        command = [sys.executable, str(PROJECT_ROOT / "examples/score_images.py"), url, "a", image]
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=60, check=False)
        return done.stderr

    with fake_server() as server:
        run(server.url)
        assert (len(server.bodies), server.authorization) == (1, f"Bearer {TOKEN}")
    assert asked == []
    assert "502" in run(ELSEWHERE)
    assert asked == [f"POST {ELSEWHERE}/score HTTP/1.1"]


NO_URL = (
    "HTTP_PROXY is not the URL of a proxy: write http://HOST:PORT without spaces; a user or password must be percent"
)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("HTTP_PROXY", "socks5://127.0.0.1:1080", "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used"),
        ("HTTP_PROXY", "ftp://proxy", NO_URL),
        ("HTTP_PROXY", "http://jane:s3cr3t/pw@proxy.corp:3128", NO_URL),
        ("HTTP_PROXY", "jane:s3cr3t#pw@proxy.corp:3128", NO_URL),
        ("HTTP_PROXY", "http://jane:s3cr3t?pw@proxy.corp:3128", NO_URL),
        # A password of digits is a port, so the user is a host.
        ("HTTP_PROXY", "http://jane:12/s3cr3t@proxy.corp:3128", NO_URL),
        ("HTTP_PROXY", "http://proxy.corp:3128\n", NO_URL),
        ("HTTP_PROXY", "http://.corp:3128", NO_URL),
        ("all_proxy", "http://jane:s3cr3t/pw@proxy.corp:3128", NO_URL.replace("HTTP_PROXY", "all_proxy")),
        ("NO_PROXY", "a, ::1,[::1]", "NO_PROXY has an entry that cannot be used ('[::1]'): give hosts, IPv6"),
        (
            "no_proxy",
            "10.0.0.0/8, fd00::/8",
            "no_proxy has an entry that cannot be used ('fd00::/8'): give hosts, IPv6",
        ),
        ("NO_PROXY", "a,http://jane:s3cr3t@b:c", "NO_PROXY has an entry that cannot be used ('http://b:c'): give"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_one_line_and_no_matter_here(
    name: str,
    value: str,
    message: str,
    asked: list[str],
    image: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    http = RewardHttp(None)
    try:
        with fake_server() as server:
            assert http.get(Exchange("fake", server.url, 5.0), "/v1/info", len) > 0
        with pytest.raises(RewardUnavailable, match=re.escape(message)) as run:
            http.get(Exchange("fake", ELSEWHERE, 5.0), "/v1/info", len)
    finally:
        http.close()
    with pytest.raises(ModelError, match=re.escape(message)) as judge:
        _http_of_url(ELSEWHERE)
    assert score_images.main(["--url", ELSEWHERE, image, "--prompt", "a"]) == 2
    told = capsys.readouterr().err
    assert (told.count("\n"), message in told) == (1, True)
    assert "s3cr3t" not in f"{told}{run.value}{judge.value}"
    assert asked == []


@pytest.mark.parametrize(
    "value", ["proxy.corp:3128", "http://jane:p%2Fw@proxy.corp", "http://jane:p@[w@proxy_1:3128/", "http://[::1]:3128"]
)
def test_proxies_that_people_have_are_taken(value: str, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", value)
    assert trusts_environment(ELSEWHERE)
    assert not trusts_environment("http://localhost:8000")
    assert asked == []


def test_no_proxy_of_a_star_makes_every_proxy_irrelevant(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "ftp://proxy")
    monkeypatch.setenv("NO_PROXY", "localhost, *")
    assert trusts_environment(ELSEWHERE)
    assert unreachable(ELSEWHERE, "otherwise") == "otherwise"
    assert asked == []


ADVICE = r"it was tried through the proxy {} of HTTP_PROXY: change or unset HTTP_PROXY, or add reward\.invalid to NO"


def test_a_proxy_that_is_gone_is_named_without_its_password(
    asked: list[str], image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with closed_url() as url:
        monkeypatch.setenv("HTTP_PROXY", url.replace("//", "//jane:s3cr3t@"))
        advice = ADVICE.format(url)
        http = RewardHttp(None)
        try:
            with pytest.raises(RewardUnavailable, match=advice) as run:
                http.get(Exchange("fake", ELSEWHERE, 5.0), "/v1/info", len)
        finally:
            http.close()
        client = VllmClient(_http_of_url(ELSEWHERE), "the judge", lambda _: None)
        with pytest.raises(ModelError, match=advice) as judge:
            client.connect(0.0)
        client.close()
        assert score_images.main(["--url", ELSEWHERE, image, "--prompt", "a"]) == 2
    told = capsys.readouterr().err
    assert re.search(advice, told)
    assert "s3cr3t" not in f"{told}{run.value}{judge.value}"
    assert asked == []


@pytest.mark.parametrize("spared", ["reward.invalid", ".invalid", "reward.invalid:8000", "a, invalid"])
def test_hosts_that_need_no_proxy_blame_none(spared: str, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "of HTTP_PROXY" in unreachable(ELSEWHERE, "otherwise")
    assert unreachable(ELSEWHERE.replace("http", "https"), "otherwise") == "otherwise"
    monkeypatch.setenv("NO_PROXY", spared)
    assert unreachable(ELSEWHERE, "otherwise") == "otherwise"
    assert asked == []


def test_the_example_shows_no_password(asked: list[str], image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://jane:s3cr3t/pw@proxy.corp:3128")
    command = [sys.executable, str(PROJECT_ROOT / "examples/score_images.py"), ELSEWHERE, "a", image]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=60, check=False)
    assert (done.stderr.count("\n"), "HTTP_PROXY" in done.stderr, "s3cr3t" in done.stderr) == (1, True, False)
    assert asked == []


@pytest.mark.parametrize(
    ("trusted", "url"),
    [
        ("http://Gpu-7:8101/hps", "HTTP://gpu-7:8101"),
        ("http://gpu-7:80", "http://gpu-7"),
        ("http://[fe80::1]:8101", "http://[FE80::1]:8101"),
        ("http://[FE80::1]:8101", "http://[fe80::1]:8101/name"),
        ("http://xn--bcher-kva.de", "http://bücher.de"),
        ("http://bücher.de", "http://xn--bcher-kva.de"),
    ],
)
def test_a_trusted_server_gets_the_token_however_it_is_spelt(trusted: str, url: str) -> None:
    elsewhere = ["http://gpu-8:8101", "http://gpu-7:8102", "https://gpu-7:8101", "http://127.0.0.1:8101", "nonsense"]
    for urls, expected in (([trusted], f"Bearer {TOKEN}"), (elsewhere, None)):
        http = RewardHttp(TOKEN)
        http.trust(urls)
        assert http._headers(Exchange("fake", url, 5.0), None).get("authorization") == expected
        http.close()
