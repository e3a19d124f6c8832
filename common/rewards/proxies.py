"""Proxies of the environment, as httpx uses them: settings that cannot be used, and advice where a proxy may fail.

A variable's value is shown without its user and password. httpx's message about an unusable one may quote the password.
"""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from common.urls import PERCENT_ENCODE, host_fault, host_of, uses_proxies, without_secrets

KINDS = ("http", "https", "all")
UNUSABLE_ENVIRONMENT = (ImportError, ValueError, OSError, httpx.InvalidURL)
"""Errors of a client that is made with a setting of the environment, see `unusable_environment`."""
UNREACHED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)
"""Errors of a request that did not reach the server, see `unreachable`."""


class _ProxyError(ValueError):
    """A proxy's URL in the environment that cannot be used."""


def trusts_environment(url: str) -> bool:
    """Whether requests to a URL may use the proxies of the environment.

    Raises:
        ValueError: they may, and one of the proxies cannot be used; see `unusable_environment`.
    """
    if not uses_proxies(url):
        return False
    for kind, address in _proxies().items():
        if _is_no_proxy(address):
            raise _ProxyError(
                f"{_variable(kind)} is not the URL of a proxy: write http://HOST:PORT without spaces; {PERCENT_ENCODE}"
            )
    return True


def unusable_environment(error: Exception) -> str:
    """The line for a setting of the environment that httpx cannot use: certificates, a proxy, or hosts without one."""
    reason = " ".join(str(error).split())
    if isinstance(error, _ProxyError):
        return reason
    if isinstance(error, OSError):
        return f"the certificates of SSL_CERT_FILE or SSL_CERT_DIR cannot be read ({reason}): change or unset it"
    if isinstance(error, ImportError):
        return f"HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used ({reason}): change or unset it"
    entry = next(filter(_is_no_host, _exceptions()), None)
    named = "" if entry is None else f" ({without_secrets(entry)!r})"
    return (
        f"{_variable('no')} has an entry that cannot be used{named}: give hosts, IPv6 addresses without brackets, "
        "and no networks of IPv6"
    )


def unreachable(url: str, otherwise: str) -> str:
    """The remedy for a failed connection: one for the proxy if requests to the URL use one, else `otherwise`."""
    proxies, parts = _proxies(), urlsplit(url)
    kind = parts.scheme if parts.scheme in proxies else "all"
    if kind not in proxies or not uses_proxies(url) or proxy_bypass(parts.netloc) or _is_excepted(host_of(url)):
        return otherwise
    variable, shown = _variable(kind), without_secrets(proxies[kind])
    return (
        f"it was tried through the proxy {shown} of {variable}: change or unset {variable}, or add {host_of(url)} to "
        f"{_variable('no')}"
    )


def _proxies() -> dict[str, str]:
    """The URLs of proxies by kind, as httpx reads them: none if NO_PROXY has a * of its own."""
    settings = getproxies()
    if "*" in _exceptions():
        return {}
    found = {kind: settings[kind] for kind in KINDS if settings.get(kind)}
    return {kind: address if "://" in address else f"http://{address}" for kind, address in found.items()}


def _exceptions() -> list[str]:
    """The entries of NO_PROXY."""
    return [entry.strip() for entry in getproxies().get("no", "").split(",")]


def _is_no_host(entry: str) -> bool:
    """Whether httpx cannot use an entry of NO_PROXY, of which it makes a URL."""
    try:
        httpx.URL(entry if "://" in entry else f"all://[{entry}]" if _is_ipv6(entry) else f"all://*{entry}")
    except (httpx.InvalidURL, ValueError):
        return True
    return False


def _is_ipv6(entry: str) -> bool:
    """Whether an entry is an IPv6 address, or a network of them."""
    try:
        ipaddress.IPv6Address(entry.partition("/")[0])
    except ValueError:
        return False
    return True


def _is_excepted(host: str) -> bool:
    """Whether NO_PROXY has a host in a way that httpx knows and Python does not: as a URL, or IPv6 without brackets."""
    entries = _exceptions()
    return host in entries or host in [host_of(entry) for entry in entries if "://" in entry]


def _is_no_proxy(address: str) -> bool:
    try:
        url = httpx.Proxy(address).url
    except (httpx.InvalidURL, ValueError):
        return True
    # A user or password with one of / # ? ends the host early; the rest, with its @, comes after it.
    return bool(host_fault(url.host)) or "@" in str(url).removeprefix(f"{url.scheme}://")


def _variable(kind: str) -> str:
    """The name of the variable, which may be in small or capital letters; small ones win."""
    name = f"{kind}_proxy"
    return name if name in os.environ else name.upper()
