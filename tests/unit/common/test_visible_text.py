"""Text without blanks around it, and text that can be printed."""

from __future__ import annotations

import os
from pathlib import Path

from common.visible_text import SPACES, printable, trimmed


def test_every_space_is_trimmed() -> None:
    assert {chr(code) for code in range(0x110000) if chr(code).isspace()} == set(SPACES)
    assert trimmed(f"{SPACES}a\u200bb{SPACES}") == "a\u200bb"
    assert trimmed("\ufeff\u2060\u200b \u200b") == ""


def test_a_file_name_in_latin_1_can_be_printed() -> None:
    assert printable(Path(os.fsdecode(b"caf\xe9/\xc3\xbc.png"))) == "caf\\udce9/ü.png"
