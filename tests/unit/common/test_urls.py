"""URLs are shown without their secrets."""

from __future__ import annotations

import pytest

from common.urls import without_secrets


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
