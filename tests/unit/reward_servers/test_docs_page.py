"""The page for people: it is true, its lines work, and it loads nothing."""

from __future__ import annotations

import asyncio
import io
import re
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from common.rewards.api import DOCS_PATH, OPENAPI_PATH
from reward_servers.doors import DOORS, FlowGrpoDoor
from tests.helpers.serving_app import LIMITS, serving_app
from tests.helpers.toy_scorers import BrightnessScorer, MischiefScorer

TOKEN = "sesame, sixteen or more"
TIMEOUT = 30.0


class Tags(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[Any]]] = []

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        self.tags.append((tag, attrs))


def drive(scenario: Callable[[httpx.AsyncClient], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        scorers = settings.pop("scorers", {"brightness": BrightnessScorer()})
        async with asyncio.timeout(TIMEOUT), serving_app(scorers, **settings) as client:
            await scenario(client)

    asyncio.run(run())


def routes(text: str) -> set[tuple[str, str]]:
    return set(re.findall(r"<td><code>(GET|POST) (\S+)</code>", text))


@pytest.mark.parametrize("doors", [DOORS, (*DOORS, FlowGrpoDoor())], ids=["default", "flow_grpo"])
def test_it_lists_the_routes_that_the_openapi_document_has(doors: Any) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        answer = await client.get(DOCS_PATH)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
        paths = (await client.get(OPENAPI_PATH)).json()["paths"]
        documented = {(method.upper(), path) for path, item in paths.items() for method in item}
        # The gradient of a scorer that has none is a route that only says so.
        assert documented - routes(answer.text) == {("POST", "/r/v1/gradient")}
        assert routes(answer.text) <= documented
        for method, path in routes(answer.text):
            assert (await client.request(method, path)).status_code not in (404, 405)

    drive(scenario, scorers={"b": BrightnessScorer(), "r": MischiefScorer()}, doors=doors)


def test_it_shows_the_limits_and_loads_nothing() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        answer = await client.get(DOCS_PATH)
        for limit in ("1048576 bytes", "4194304 bytes", "4096 pixels", "30 s", "32768 bytes", "[0, 1]"):
            assert limit in answer.text
        parser = Tags()
        parser.feed(answer.text)
        assert {tag for tag, _ in parser.tags} & {"script", "link", "img", "iframe", "form", "a", "base"} == set()
        assert {name for _, attributes in parser.tags for name, _ in attributes} == {"lang", "charset"}
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")

    drive(scenario)


def shell_lines(text: str, url: str, image: Path) -> str:
    """What the page shows up to the lines for Python, with the place of this server."""
    shown = unescape(re.findall(r"<pre>(.*?)</pre>", text, flags=re.DOTALL)[0]).split("# with this project")[0]
    return shown.replace("http://HOST:PORT", url).replace("IMAGE", str(image))


@pytest.mark.parametrize("token", [None, TOKEN])
def test_its_lines_work_in_a_shell(token: str | None, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (255, 255, 255)).save(buffer, "PNG")
    (tmp_path / "white.png").write_bytes(buffer.getvalue())

    async def scenario(client: httpx.AsyncClient) -> None:
        page = (await client.get(DOCS_PATH)).text
        lines = shell_lines(page, str(client.base_url), tmp_path / "white.png")
        done = await asyncio.to_thread(
            subprocess.run,
            ["bash", "-euo", "pipefail", "-c", lines],
            env={"PATH": "/usr/bin:/bin", "REWARD_SERVER_TOKEN": token or ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        assert '{"score": 1.0}' in done.stdout
        assert '"scorer": "brightness"' in done.stdout
        assert TOKEN not in page

    drive(scenario, limits=replace(LIMITS, token=token))


def test_a_name_cannot_become_html() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        page = (await client.get(DOCS_PATH)).text
        assert "<b>" not in page
        assert "&lt;b&gt;" in page

    drive(scenario, scorers={"<b>": BrightnessScorer()})
