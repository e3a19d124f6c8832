"""HTTP server of the live page: routes, access by token, headers. It has no route that changes anything of a run."""

from __future__ import annotations

import hmac
import json
import re
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from common.errors import RtdmdError
from common.urls import host_of, is_loopback
from learner.records.group_files import FOLDER, NAME
from learner.records.live_run import GRID, SECTIONS, LiveRun
from learner.records.script import LIVE_SCRIPT, SCRIPT
from learner.records.style import STYLE

MOST_CONNECTIONS = 64
"""Further connections are closed at once: the page shares its process with the driver of the run."""
SOCKET_S = 10.0
"""A connection that neither sends nor reads for so long is closed."""
LONGEST_FORM = 4096
"""Bytes of a form with a token."""
PICTURES = {".png": "image/png", ".jpg": "image/jpeg"}
OF_GALLERY = re.compile(r"policies/[a-z0-9_]+-\d+\.png")
POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
"""The browser loads nothing from other hosts, and runs no script but ours, whatever a prompt contains."""


class PageServer(ThreadingHTTPServer):
    """Serves one run directory, in threads of its own.

    Raises:
        OSError: the address cannot be used.
    """

    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, run_dir: Path, host: str, port: int, token: str | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__((host, port), partial(_Handler, LiveRun(run_dir), token, secrets.token_urlsafe(32)))

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Start a thread for the connection, or close it if there are too many."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._free.release()
            raise

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that goes away is no line in the console of a run."""


class _Handler(BaseHTTPRequestHandler):
    """One connection.

    Args:
        token: what the page asks for; None if it is open.
        session: the value of the cookie that a browser gets for the token, so that it need not keep the token.
    """

    timeout = SOCKET_S
    server_version = "rtdmd"
    sys_version = ""

    def __init__(self, run: LiveRun, token: str | None, session: str, *of_connection: object) -> None:
        self._run, self._token, self._session = run, token, session
        super().__init__(*of_connection)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Answer a page, a section, a group or a picture."""
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if not self._answered_without(parts.path):
            try:
                self._answer(parts.path.removeprefix("/"), query)
            except RtdmdError as error:
                self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", str(error).encode())

    def do_POST(self) -> None:
        """Exchange the token for a cookie. Nothing else can be sent."""
        if self._foreign():
            self._send(HTTPStatus.FORBIDDEN, "text/plain", FOREIGN.encode())
            return
        length = self.headers.get("content-length", "")
        if self.path != "/token" or self._token is None or not length.isdecimal() or int(length) > LONGEST_FORM:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"there is nothing to send here")
            return
        form = parse_qs(self.rfile.read(int(length)).decode("utf-8", "replace"))
        if not _equal(form.get("token", [""])[-1].strip(), self._token):
            self._send(HTTPStatus.UNAUTHORIZED, "text/html", _token_page("This is not the token.").encode())
            return
        cookie = f"{self._cookie}={self._session}; HttpOnly; SameSite=Strict; Path=/"
        self._send(HTTPStatus.SEE_OTHER, "text/plain", b"", {"Location": "/", "Set-Cookie": cookie})

    def log_message(self, format: str, *args: object) -> None:
        """Requests are no lines in the console of a run."""

    def _answered_without(self, path: str) -> bool:
        """Answer a request that may not read the run, and say so."""
        if self._foreign():
            self._send(HTTPStatus.FORBIDDEN, "text/plain", FOREIGN.encode())
            return True
        if not self._permitted():
            page = _token_page("") if path == "/" else "the token is needed: open the page and enter it"
            kind = "text/html" if path == "/" else "text/plain"
            self._send(HTTPStatus.UNAUTHORIZED, kind, page.encode(), {"WWW-Authenticate": "Bearer"})
            return True
        return False

    def _foreign(self) -> bool:
        """Whether an open page is asked under a name that is not this machine's."""
        return self._token is None and not is_loopback(host_of(f"http://{self.headers.get('host', '')}"))

    def _permitted(self) -> bool:
        if self._token is None:
            return True
        scheme, _, given = self.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _equal(given.strip(), self._token):
            return True
        try:
            cookies = SimpleCookie(self.headers.get("cookie", ""))
        except CookieError:
            return False
        return self._cookie in cookies and _equal(cookies[self._cookie].value, self._session)

    @property
    def _cookie(self) -> str:
        """Browsers do not tell ports apart, so the name has the port."""
        return f"rtdmd_page_{self.connection.getsockname()[1]}"

    def _answer(self, path: str, query: Mapping[str, str]) -> None:
        texts: Mapping[str, tuple[str, Callable[[], str]]] = {
            "": ("text/html", lambda: _page(self._run.run_dir.resolve().name)),
            "page.css": ("text/css", lambda: STYLE),
            "page.js": ("text/javascript", lambda: SCRIPT + LIVE_SCRIPT),
            "sections": ("application/json", lambda: json.dumps(self._run.changed(_stamps(query.get("have", ""))))),
            "groups": ("text/html", lambda: self._run.cards(query.get("name", ""))),
            "group": ("text/html", lambda: self._run.detail(query.get("name", ""), _number(query.get("place", "")))),
        }
        if path in texts:
            kind, text = texts[path]
            self._send(HTTPStatus.OK, kind, text().encode())
        else:
            self._picture(path)

    def _picture(self, path: str) -> None:
        """A picture below samples/: only files with the names that a run gives them."""
        name = path.removeprefix("pictures/")
        of_group = NAME.fullmatch(name.removeprefix("groups/")) if name.startswith("groups/") else None
        known = name != path and (of_group or GRID.fullmatch(name) or OF_GALLERY.fullmatch(name))
        file = self._run.run_dir / FOLDER.parent / name
        if not known or file.suffix not in PICTURES or not file.is_file():
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page")
            return
        self._send(HTTPStatus.OK, PICTURES[file.suffix], file.read_bytes(), {"Cache-Control": "private, max-age=60"})

    def _send(self, status: HTTPStatus, kind: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        charset = "" if kind.startswith("image/") else "; charset=utf-8"
        always = {
            "Cache-Control": "no-store",
            "Content-Security-Policy": POLICY,
            "Content-Type": f"{kind}{charset}",
            "Content-Length": str(len(body)),
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        self.send_response(status)
        for name, value in (always | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


FOREIGN = "this page is open to this machine alone: use http://127.0.0.1, or set a token"


def _equal(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


def _stamps(text: str) -> Mapping[str, str]:
    try:
        stamps = json.loads(text or "{}")
    except ValueError:
        return {}
    return stamps if isinstance(stamps, dict) else {}


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 6 else -1


HEAD = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
)


def _page(name: str) -> str:
    """The page without its sections, which the script fetches."""
    sections = "".join(f'<section id="{section}"></section>' for section in SECTIONS)
    links = " ".join(f'<a href="#{section}">{section}</a>' for section in SECTIONS)
    return (
        f'{HEAD}<title>{escape(name)}, live</title><link rel="stylesheet" href="page.css">'
        f'</head><body><main><h1>{escape(name)}</h1><nav class="jump">{links}</nav>'
        f'<p id="lost" class="note warning" role="status" hidden></p>{sections}</main>'
        '<dialog id="group"></dialog><script src="page.js"></script></body></html>\n'
    )


def _token_page(fault: str) -> str:
    return (
        f"{HEAD}<title>Token</title><style>{STYLE}</style></head><body><main><h1>Token</h1>"
        '<p class="note">This page shows a run. It needs the token that the run was started with '
        f'(RTDMD_DASHBOARD_TOKEN).</p><p class="note warning">{escape(fault)}</p><form method="post" action="/token">'
        '<label>Token <input type="password" name="token" autocomplete="off" autofocus></label> '
        '<button class="plain">Show the run</button></form></main></body></html>\n'
    )
