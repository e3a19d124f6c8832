"""Serves the driver's metrics over HTTP, and lists a run's endpoints in a file for Prometheus."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from common.errors import ConfigError
from common.whole_files import write_whole

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

LAST_SCRAPE_S = 15.0
"""At its end a run that Prometheus reads waits this long for one more scrape, which takes its last values."""
WATCHED_S = 60.0
"""Prometheus reads the run if it did so within this time."""


class _Handler(WSGIRequestHandler):
    timeout = 10.0
    """Seconds in which a client must send its request and take the response."""

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: one line per scrape would hide the rest."""


class _Server(ThreadingMixIn, WSGIServer):
    """One thread per request, so that a client that stops in the middle delays no other. `server_close` joins them."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client went away."""


class MetricsServer:
    """A /metrics endpoint; it answers from its construction to `close`.

    Args:
        port: 0 picks a free one, see the attribute `port`.

    Raises:
        ConfigError: the port is taken or not permitted.
    """

    def __init__(
        self,
        port: int,
        registry: CollectorRegistry,
        host: str = "127.0.0.1",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = make_wsgi_app(registry)
        self._clock = clock
        self._scrapes = 0
        self._scraped = threading.Condition()
        self._last_scrape: float | None = None
        try:
            self._server = make_server(host, port, self._answer, server_class=_Server, handler_class=_Handler)
        except OSError as error:
            raise ConfigError(
                f"metrics.port = {port}: cannot listen on {host}:{port} ({error.strerror}): choose another, "
                "or 0 for any"
            ) from error
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_for_scrape(self, seconds: float = LAST_SCRAPE_S) -> bool:
        """Wait until the present values were read, if somebody reads them; whether they were."""
        with self._scraped:
            if self._last_scrape is None or self._clock() - self._last_scrape > WATCHED_S:
                return False
            before = self._scrapes
            return self._scraped.wait_for(lambda: self._scrapes > before, seconds)

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def _answer(self, environment: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        answer: Iterable[bytes] = self._app(environment, start)
        with self._scraped:
            self._scrapes += 1
            self._last_scrape = self._clock()
            self._scraped.notify_all()
        return answer


class Targets:
    """A file of Prometheus (`file_sd_configs`) with the endpoints of a run.

    It exists while the run does. It stays after SIGKILL, so that Prometheus reports the run as down.
    The label `instance` is the same in every session of a run: a resumed run continues its series.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path, self._run = path, run

    def write(self, driver: str, rewards: Mapping[str, Iterable[str]]) -> None:
        """HOST:PORT of the driver's endpoint, and the URLs of each reward's servers.

        Raises:
            ConfigError: the file cannot be written.
        """
        entries = [self._entry(driver, job="driver", instance=self._run)]
        servers: dict[tuple[str, str], list[str]] = {}
        for name, urls in rewards.items():
            for url in urls:
                servers.setdefault(_address(url), []).append(name)
        for (scheme, address), names in servers.items():
            entries.append(self._entry(address, job="reward_server", reward=",".join(names), __scheme__=scheme))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(entries, indent=1).encode())
        except OSError as error:
            raise ConfigError(
                f"metrics.targets: {self._path} cannot be written ({error.strerror}): name another folder"
            ) from error

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _entry(self, address: str, **labels: str) -> dict[str, object]:
        return {"targets": [address], "labels": {"run": self._run, **labels}}


def _address(url: str) -> tuple[str, str]:
    """The scheme, and HOST:PORT. Several rewards may have one server."""
    parts = urlsplit(url)
    has_port = ":" in parts.netloc.rpartition("]")[2]
    default = ":443" if parts.scheme == "https" else ":80"
    return parts.scheme, parts.netloc if has_port else parts.netloc + default
