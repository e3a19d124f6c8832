"""Facts about a URL or host, read from its text alone."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

THIS_MACHINE = ("0.0.0.0", "::", "localhost.", "localhost.localdomain", "ip6-localhost")
"""Hosts that lead to this machine, though not to its loopback interface alone or not on every machine."""


def is_loopback(host: str) -> bool:
    """Whether a host name or address certainly means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(url: str) -> str:
    """The host of a URL in lower case, without brackets; "" when the URL has no host."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def uses_proxies(url: str) -> bool:
    """Whether requests to a URL may use the proxies of the environment: never those to this machine."""
    host = host_of(url)
    return not (is_loopback(host) or host in THIS_MACHINE or host.endswith(".localhost"))


def unusable_proxy(error: Exception) -> str:
    """The line for proxies of the environment that httpx cannot use: a SOCKS proxy, or no URL at all."""
    reason = " ".join(str(error).split())
    return f"a proxy of HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used ({reason}): change it, or set NO_PROXY"


def without_secrets(url: str) -> str:
    """The URL without credentials and query, safe to show."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(no URL)"
    where = parts.netloc.rpartition("@")[2]
    if not parts.netloc:
        # A mistyped URL: scheme and path cannot be separated, but credentials end at an "@".
        return url.partition("?")[0].rpartition("@")[2]
    return f"{parts.scheme}://{where}{parts.path}"
