"""A headless Chromium that tests drive over its DevTools protocol. A test that uses it skips where there is none."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
START_S, ANSWER_S = 30.0, 30.0
LISTENING = re.compile(rb"DevTools listening on (ws://\S+)")


@dataclass
class Tab:
    """One page. `failures` collects errors of its console and requests that were refused or blocked."""

    socket: aiohttp.ClientWebSocketResponse
    session: str
    failures: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    number: int = 0

    async def call(self, method: str, **parameters: Any) -> Any:
        """The result of a DevTools command."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        await self.socket.send_json(message | ({"sessionId": self.session} if self.session else {}))
        async with asyncio.timeout(ANSWER_S):
            while True:
                answer = await self.socket.receive_json()
                if answer.get("id") == self.number:
                    if "error" in answer:
                        raise RuntimeError(f"{method}: {answer['error']}")
                    return answer["result"]
                self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                self.failures.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
            case "Runtime.exceptionThrown":
                self.failures.append(json.dumps(parameters["exceptionDetails"]))

    async def open(self, url: str, width: int = 1280, *, dark: bool = False) -> None:
        """Load a page at this width, and wait for its load event."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.resize(width)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def resize(self, width: int, height: int = 900) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def value(self, script: str) -> Any:
        """The value of an expression in the page; promises are awaited."""
        result = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    async def until(self, script: str, seconds: float = ANSWER_S) -> None:
        """Wait until an expression in the page is true. While a page is being replaced, it may have no value."""
        last = ""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        if await self.value(f"Boolean({script})"):
                            return
                    except RuntimeError as error:
                        last = str(error)
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            raise AssertionError(f"waited {seconds:g} s in vain for {script}; {last}") from error

    async def click(self, selector: str) -> None:
        await self.value(f"document.querySelector({json.dumps(selector)}).click()")

    async def point_at(self, selector: str) -> None:
        """Scroll an element into view and move the mouse to its middle."""
        await self.value(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        # The page reacts to the scrolling in its next frame.
        await self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        box = await self.value(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    async def screenshot(self, path: Path, *, whole: bool = True) -> None:
        data = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(data["data"]))


@contextmanager
def chromium() -> Iterator[str]:
    """Start the browser; yield the address of its DevTools socket."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        process = subprocess.Popen(
            [CHROMIUM, *options, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        try:
            seen = b""
            for line in process.stderr:
                seen += line
                if found := LISTENING.search(line):
                    yield found[1].decode()
                    break
            else:
                pytest.fail(f"chromium did not start: {seen.decode(errors='replace')[-2000:]}")
        finally:
            process.kill()
            process.wait(timeout=START_S)
            process.stderr.close()


class Browser:
    """Runs coroutines on tabs of one Chromium, see `chromium`."""

    def __init__(self, address: str) -> None:
        self._address = address

    def run(self, script: Callable[[Tab], Awaitable[Any]]) -> Any:
        """Run `script(tab)`, a coroutine function, on a fresh tab, and return its result."""
        return asyncio.run(self._run(script))

    async def _run(self, script: Callable[[Tab], Awaitable[Any]]) -> Any:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(self._address, max_msg_size=0) as socket,
        ):
            root = Tab(socket, "")
            context = (await root.call("Target.createBrowserContext"))["browserContextId"]
            target = await root.call("Target.createTarget", url="about:blank", browserContextId=context)
            attached = await root.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
            tab = Tab(socket, attached["sessionId"], number=root.number)
            try:
                return await script(tab)
            finally:
                closing = Tab(socket, "", number=tab.number + 1000)
                await closing.call("Target.disposeBrowserContext", browserContextId=context)
