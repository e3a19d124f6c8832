"""One HTML file that needs nothing else: styles, scripts and pictures are in it, and its policy forbids the network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape

from learner.records.script import SCRIPT
from learner.records.style import STYLE


def whole_page(title: str, sections: Iterable[str]) -> str:
    """The page as text; empty sections are left out."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )
