"""Text without the blanks around it, and text that can be printed."""

from __future__ import annotations

WITHOUT_WIDTH = "\u200b\u2060\ufeff"
"""Zero-width space, word joiner and byte-order mark: a line of nothing else looks blank."""
SPACES = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""Every character that `str.isspace` knows."""


def printable(value: object) -> str:
    """The value as text; bytes of a file name that are not UTF-8 are written as escapes."""
    return str(value).encode(errors="backslashreplace").decode()


def trimmed(text: str) -> str:
    """The text without spaces, line ends and characters without width at its ends."""
    return text.strip(SPACES + WITHOUT_WIDTH)
