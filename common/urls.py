"""What can be told from an address alone."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine, and nothing else can be meant."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(url: str) -> str:
    """The host of a URL, lower case, without brackets; "" when it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def without_secrets(url: str) -> str:
    """A URL that may be shown: credentials and query left out."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(no URL)"
    where = parts.netloc.rpartition("@")[2]
    if not parts.netloc:
        # Mistyped: what a scheme or a path is cannot be told, but credentials end at an "@".
        return url.partition("?")[0].rpartition("@")[2]
    return f"{parts.scheme}://{where}{parts.path}"
