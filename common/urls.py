"""Facts about a URL or host, read from its text alone."""

from __future__ import annotations

import ipaddress
import re
import socket
import unicodedata
from urllib.parse import parse_qs, urlsplit

SERVER_URL = re.compile(r"https?://[^\s@?#]+", re.IGNORECASE)
REGISTERED_URL = re.compile(r"https?://[^\s@?#/\\]+:[0-9]{1,5}(/[A-Za-z0-9][A-Za-z0-9_.-]*)?", re.IGNORECASE)
LONGEST_URL = 512
"""A registered URL has at most this many characters: a host has at most 255."""
HOST_NAME = re.compile(r"[A-Za-z0-9._-]+")
LONGEST_LABEL = 63
"""A name between the dots of a host has at most this many characters."""
PERCENT_ENCODE = "a user or password must be percent-encoded (/ as %2F, # as %23, ? as %3F)"
"""Advice for a URL whose password ends its host early. What a library says of such a URL quotes the password."""
REDIS_URL = re.compile(r"(?:rediss?|unix)://.*", re.IGNORECASE)
REDIS_SECRETS = ("username", "password", "ssl_password")
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


def host_fault(host: str) -> str:
    """Why a text cannot be a host alone, without quoting it; "" if it can. IPv6 addresses have no brackets here."""
    named = HOST_NAME.fullmatch("".join(mark for mark in host if not _is_of_a_word(mark)) or "x")
    if not (_address(host) is not None if ":" in host else host and named):
        return "not a host alone, such as 192.0.2.2, gpu-7 or ::1"
    labels = host.removesuffix(".").split(".")
    if all(0 < len(label) <= LONGEST_LABEL for label in labels):
        return ""
    return f"not a host name: each part between its dots has 1 to {LONGEST_LABEL} characters"


def _is_of_a_word(mark: str) -> bool:
    """Whether a character beyond ASCII is a letter, a digit or a mark on one, and no dash or space."""
    return not mark.isascii() and unicodedata.category(mark)[0] in "LMN"


def server_url_fault(url: str) -> str:
    """Why a text cannot be the base URL of a server, without quoting it; "" if it can."""
    if "@" in url:
        return "a URL with a user or password would be written into files: leave them out"
    if not SERVER_URL.fullmatch(url) or not host_of(url):
        return "not an http(s) URL with a host; write http://HOST:PORT, or http://HOST:PORT/NAME"
    return _place_fault(url)


def registered_url_fault(url: str) -> str:
    """Why a text cannot be the URL of a registered server, without quoting it; "" if it can.

    Anybody who can write to the registry names it, and runs send requests there. So nothing but a place is accepted.
    """
    if len(url) > LONGEST_URL or not REGISTERED_URL.fullmatch(url):
        return "a registered URL is http(s)://HOST:PORT, or http(s)://HOST:PORT/NAME"
    return server_url_fault(url)


def redis_url_fault(url: str) -> str:
    """Why a text cannot be the URL of a Redis, without quoting it; "" if it can. Its path may be a socket (unix)."""
    if not REDIS_URL.fullmatch(url):
        return "not a URL of Redis; write redis://HOST:PORT/DB"
    try:
        parts = urlsplit(url)
    except ValueError:
        return f"not a URL of Redis; {PERCENT_ENCODE}"
    if "@" in url and "@" not in parts.netloc and parts.scheme != "unix":
        return PERCENT_ENCODE
    if not set(parse_qs(parts.query)).isdisjoint(REDIS_SECRETS):
        return "a user or password in its query would be shown: set REDIS_USERNAME and REDIS_PASSWORD instead"
    return _place_fault(url)


def _place_fault(url: str) -> str:
    """Why no server can be at the host and port of a URL; "" if one can."""
    host = host_of(url)
    if host and host_fault(host):
        return f"its host is {host_fault(host)}"
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
