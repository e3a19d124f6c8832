"""URLs are shown without their secrets."""

from __future__ import annotations

import pytest

from common.urls import (
    host_fault,
    redis_url_fault,
    registered_url_fault,
    server_url_fault,
    uses_proxies,
    without_secrets,
)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://user:secret@host:6379/0?password=secret", "redis://host:6379/0"),
        ("foo", "foo"),
        ("user:secret@host", "host"),
        ("redis:/:secret@host", "host"),
        ("redis://[secret", "(no URL)"),
        ("http://user:sec/ret@host", "http://..."),
        ("http://user:sec?ret@host", "http://..."),
        ("http://user:sec@ret@host/a", "http://host/a"),
    ],
)
def test_credentials_are_not_shown(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "http://host",
        "https://10.0.0.7:8101/hps",
        "http://[::1]:80/a/",
        "http://[fe80::1%25eth0]:80",
        "HTTP://Gpu_7.cluster.local.:81",
        "https://bücher.example",
        f"http://{'x' * 63}.corp",
    ],
)
def test_the_base_url_of_a_server(url: str) -> None:
    assert server_url_fault(url) == ""


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("http://user:secret@host", "user or password"),
        ("http://user:sec/ret@host", "user or password"),
        ("http://host/?token=secret", "not an http"),
        ("ftp://secret", "not an http"),
        ("http://", "not an http"),
        ("http://:8000", "URL with a host"),
        ("http://host:81010", "its port is no number from 1 to 65535"),
        ("http://host:0", "its port is no number"),
        ("http://host:http/secret", "its port is no number"),
        (
            "http://.cluster.local:8101",
            "its host is not a host name: each part between its dots has 1 to 63 characters",
        ),
        ("http://gpu-7..x:8101", "its host is not a host name"),
        ("http://gpu-7..", "its host is not a host name"),
        (f"http://{'x' * 64}.corp", "its host is not a host name"),
        ("http://*.corp:8101", "its host is not a host alone"),
    ],
)
def test_a_url_that_would_show_a_secret_or_leads_nowhere_is_none(url: str, fault: str) -> None:
    assert fault in server_url_fault(url)
    assert "secret" not in server_url_fault(url)


@pytest.mark.parametrize("host", ["192.0.2.2", "gpu-7", "a.b_c", "::1", "FE80::1", "fe80::1%eth0", "localhost."])
def test_a_host_alone(host: str) -> None:
    assert host_fault(host) == ""


@pytest.mark.parametrize(
    "host",
    [
        "192.0.2.2:8996",
        "http://192.0.2.2",
        "*.cluster.local",
        ".cluster.local",
        "10.0.0.0/8",
        "[::1]",
        "a b",
        "a,b",
        "",
    ],
)
def test_what_is_more_than_a_host(host: str) -> None:
    assert "not a host" in host_fault(host)


@pytest.mark.parametrize(
    "url",
    [
        "redis://host:6379/0",
        "REDISS://host",
        "redis://me:p%23w@host/1?socket_timeout=3",
        "redis://:pw@/0",
        "redis:///2",
        "redis://[::1]:6379",
        "unix:///run/redis@1.sock?db=1",
    ],
)
def test_the_url_of_a_redis(url: str) -> None:
    assert redis_url_fault(url) == ""


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("http://secret", "not a URL of Redis"),
        ("redis://me:secret#x@host:6379/0", "must be percent-encoded"),
        ("redis://me:12/secret@host:6379/0", "percent-encoded"),
        ("redis://me:12?secret@host:6379/0", "percent-encoded"),
        ("redis://me:sec[ret@host:6379/0", "percent-encoded"),
        ("redis://host/0?password=secret", "set REDIS_USERNAME and REDIS_PASSWORD"),
        ("redis://host/0?db=1&p%61ssword=secret", "set REDIS_USERNAME and REDIS_PASSWORD"),
        ("unix:///run/redis.sock?username=secret", "set REDIS_USERNAME and REDIS_PASSWORD"),
        ("redis://host:secret", "its port is no number"),
        ("redis://redis..secret", "its host is not a host name"),
    ],
)
def test_a_url_of_redis_that_would_show_a_secret_is_none(url: str, fault: str) -> None:
    assert fault in redis_url_fault(url)
    assert "secret" not in redis_url_fault(url)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", False),
        ("http://127.8.9.1/name", False),
        ("http://LOCALHOST:8000", False),
        ("http://[::1]:8000", False),
        ("http://0.0.0.0:8000", False),
        ("http://judge.localhost", False),
        ("http://127.1:8000", False),
        ("http://127.0.0.1.:8000", False),
        ("http://localhost.:8000", False),
        ("http://0x7f000001:8000", False),
        ("http://2130706433:8000", False),
        ("http://[::ffff:127.0.0.1]:8000", False),
        ("http://[::]:8000", False),
        ("http://10.7:8000", True),
        ("http://face.fade", True),
        ("http://10.0.0.7:8000", True),
        ("https://rewards.example.org", True),
        ("http://localhost.example.org", True),
    ],
)
def test_no_request_to_this_machine_uses_a_proxy(url: str, expected: bool) -> None:
    assert uses_proxies(url) is expected


@pytest.mark.parametrize(
    "url",
    ["http://host:1", "https://10.0.0.7:8101/hps", "HTTP://[::1]:80/a_b.c-d", "http://gpu-7.cluster.local:65535"],
)
def test_the_url_of_a_registered_server(url: str) -> None:
    assert registered_url_fault(url) == ""


@pytest.mark.parametrize(
    "url",
    [
        "http://host",
        "http://host/hps",
        "http://host:1/",
        "http://host:1/a/b",
        "http://host:1/.",
        "http://host:1/..",
        "http://host:1/%2e%2e",
        "http://host:1//a",
        "http://host:1/admin/delete?id=1&x=",
        "http://host:1?x=",
        "http://host:1#",
        "http://host:1/a#b",
        "http://user:secret@host:1",
        "http://secret@host:1",
        "http://host\\@other:1",
        "http://host:0",
        "http://host:65536",
        "http://:1",
        "http://host:1\n",
        "http://ho st:1",
        "gopher://host:1",
        "file:///etc/passwd",
        "unix:///run/server:1",
        "http://" + "a." * 300 + "b:1",
        "",
    ],
)
def test_anything_else_is_not_registered(url: str) -> None:
    assert registered_url_fault(url)
    assert "secret" not in registered_url_fault(url)
