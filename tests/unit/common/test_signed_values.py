"""Signed values: only the holder of the token makes one, for one name and one purpose."""

from __future__ import annotations

import hashlib
import hmac
import logging

import pytest

from common.signed_values import Purpose, Signer

TOKEN = "0123456789abcdef"
NAME, PAYLOAD = "rtdmd:score:a", b"\x00\x01payload"
OTHERS = [
    Signer(TOKEN[:-1] + "0", Purpose.SCORE).signed(NAME, PAYLOAD),
    Signer(TOKEN, Purpose.REGISTRATION).signed(NAME, PAYLOAD),
    Signer(TOKEN, Purpose.SCORE).signed(NAME + "b", PAYLOAD),
    Signer(TOKEN, Purpose.SCORE).signed(NAME[:-1], b"a" + PAYLOAD),
    Signer(TOKEN, Purpose.SCORE).signed(NAME, PAYLOAD)[:-1],
    Signer(TOKEN, Purpose.SCORE).signed(NAME, PAYLOAD) + b"x",
    Signer(TOKEN, Purpose.SCORE).signed(NAME, PAYLOAD)[:31],
    Signer(None, Purpose.SCORE).signed(NAME, PAYLOAD),
    bytes(32) + PAYLOAD,
    b"",
]
"""Values of another token, purpose or name, values that were changed, and values without a signature."""


def test_a_signature_is_an_hmac_under_a_key_of_token_and_purpose() -> None:
    stretched = hashlib.pbkdf2_hmac("sha256", TOKEN.encode(), b"rtdmd: values in Redis", 100_000)
    key = hmac.new(stretched, b"cached score", hashlib.sha256).digest()
    expected = hmac.new(key, b"\x0d" + bytes(7) + NAME.encode() + PAYLOAD, hashlib.sha256).digest()
    assert Signer(TOKEN, Purpose.SCORE).signed(NAME, PAYLOAD) == expected + PAYLOAD


def test_what_was_signed_is_read_and_nothing_else() -> None:
    signer = Signer(TOKEN, Purpose.SCORE)
    for payload in (PAYLOAD, b""):
        assert signer.payload(NAME, signer.signed(NAME, payload)) == payload
    assert signer.ignored == 0
    assert [signer.payload(NAME, value) for value in OTHERS] == [None] * len(OTHERS)
    assert signer.ignored == len(OTHERS)


def test_without_a_token_a_value_is_its_payload() -> None:
    signer = Signer(None, Purpose.SCORE)
    assert not signer.signs
    assert signer.signed(NAME, PAYLOAD) == PAYLOAD
    assert signer.payload(NAME, PAYLOAD) == PAYLOAD


@pytest.mark.parametrize("purpose", Purpose)
def test_ignored_values_are_said_once_with_the_remedy_and_without_the_token(
    purpose: Purpose, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    signer = Signer(TOKEN, purpose)
    for _ in range(3):
        assert signer.payload(NAME, b"planted") is None
    (record,) = caplog.records
    assert f"Redis: '{NAME}' is ignored" in record.getMessage()
    assert {
        Purpose.REGISTRATION: "start its server with the REWARD_SERVER_TOKEN of this run",
        Purpose.SCORE: "give all runs that share this Redis one REWARD_SERVER_TOKEN",
        Purpose.RUN_CONTROL: "use `rtdmd control` with the REWARD_SERVER_TOKEN of the run",
    }[purpose] in record.getMessage()
    assert TOKEN not in caplog.text
