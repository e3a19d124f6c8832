"""Facts about a URL or host, read from its text alone."""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

SERVER_URL = re.compile(r"https?://[^\s@?#]+")
NUMERIC = re.compile(r"[0-9a-fx.]+")
"""Every spelling of an IPv4 address that a resolver reads, and some that it refuses."""
THIS_MACHINE = ("localhost.localdomain", "ip6-localhost")
"""Hosts that lead to this machine, though not to its loopback interface alone or not on every machine."""


def is_loopback(host: str) -> bool:
    """Whether a host name or address certainly means this machine."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a resolver sees in a host: also in 127.1, 0x7f000001 and ::ffff:127.0.0.1."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not NUMERIC.fullmatch(host):
            return None
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def host_of(url: str) -> str:
    """The host of a URL in lower case, without brackets; "" when the URL has no host."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def uses_proxies(url: str) -> bool:
    """Whether requests to a URL may use the proxies of the environment: never those to this machine."""
    host = host_of(url).rstrip(".")
    address = _address(host)
    unspecified = address is not None and address.is_unspecified
    return not (is_loopback(host) or unspecified or host in THIS_MACHINE or host.endswith(".localhost"))


def server_url_fault(url: str) -> str:
    """Why a text cannot be the base URL of a server, without quoting it; "" if it can."""
    if "@" in url:
        return "a URL with a user or password would be written into files: leave them out"
    if not SERVER_URL.fullmatch(url) or not host_of(url):
        return "not an http(s) URL with a host; write http://HOST:PORT, or http://HOST:PORT/NAME"
    try:
        port = urlsplit(url).port
    except ValueError:
        port = 0
    return "its port is no number from 1 to 65535" if port == 0 else ""


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
    if "@" in url and parts.netloc == where:
        return f"{parts.scheme}://..."  # a password with a slash or a question mark: the host is unknown
    return f"{parts.scheme}://{where}{parts.path}"
