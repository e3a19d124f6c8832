"""URLs are shown without their secrets."""

from __future__ import annotations

import pytest

from common.urls import uses_proxies, without_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://user:secret@host:6379/0?password=secret", "redis://host:6379/0"),
        ("foo", "foo"),
        ("user:secret@host", "host"),
        ("redis:/:secret@host", "host"),
        ("redis://[secret", "(no URL)"),
    ],
)
def test_credentials_are_not_shown(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


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
