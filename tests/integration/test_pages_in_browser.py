"""The report, the live page and a comparison in a real browser: what a person sees, points at and clicks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.records.compare import write_comparison
from learner.records.live_page import DASHBOARD_TOKEN, live_page
from learner.records.report import write_report
from tests.helpers.browser import Browser, Tab, chromium, needs_chromium
from tests.helpers.run_directory import record, write_group, write_run

pytestmark = needs_chromium

WIDTHS = (1280, 400)
GROUND = "getComputedStyle(document.body).backgroundColor"
OVERFLOWS = "document.documentElement.scrollWidth > innerWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as address:
        yield Browser(address)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


async def looks_right(tab: Tab, url: str, drawn: str) -> None:
    """The page fits the window, light and dark, wide and narrow; `drawn` is true once all is there."""
    grounds = []
    for dark in (False, True):
        for width in WIDTHS:
            await tab.open(url, width, dark=dark)
            await tab.until(drawn)
            assert not await tab.value(OVERFLOWS), f"{width} px: the page is wider than its window"
        grounds.append(await tab.value(GROUND))
    assert grounds[0] != grounds[1]


async def pointed_and_enlarged(tab: Tab) -> None:
    """A curve shows its value under the pointer; a picture is enlarged, the next one by an arrow key."""
    await tab.point_at("svg[data-chart]")
    await tab.until("!document.querySelector('.tip').hidden")
    assert " at " in await tab.value("document.querySelector('.tip').textContent")
    before = await tab.value("document.querySelector('.gallery .enlarge').getBoundingClientRect().width")
    await tab.click(".gallery .enlarge")
    await tab.until("document.querySelector('#large[open] .view')")
    assert await tab.value("document.querySelector('#large .view').getBoundingClientRect().width") > before
    first = await tab.value("document.querySelector('#large p').textContent")
    await tab.value("document.getElementById('large').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))")
    assert await tab.value("document.querySelector('#large p').textContent") != first
    await tab.click("#large .view")
    await tab.until("!document.querySelector('#large').open")


def test_report_and_comparison_need_nothing_but_themselves(browser: Browser, run_dir: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", gain=0.1)
    pages = [write_report(run_dir), write_comparison([run_dir, other], tmp_path / "compare.html")]

    async def look(tab: Tab) -> None:
        for page in pages:
            await looks_right(tab, page.as_uri(), "document.querySelector('svg[data-chart]')")
            await pointed_and_enlarged(tab)
        assert tab.failures == []
        assert {url.partition(":")[0] for url in tab.requests} == {"file", "data"}

    browser.run(look)


def test_the_live_page_follows_a_run(browser: Browser, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", finished=False)

    async def look(tab: Tab, url: str) -> None:
        await looks_right(tab, url, "document.querySelector('#timeline .span')")
        await pointed_and_enlarged(tab)
        write_group(run_dir, 20)
        with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as more:
            more.write(record("alignment", 20, time=1.8e9 + 99, **{"reward/hps": 0.9}) + "\n")
        await tab.until("document.getElementById('now').textContent.includes('21 of 40 iterations')")
        await tab.until("document.querySelector('.group').dataset.group.includes('alignment-000020')")
        await tab.click(".group")
        await tab.until("document.querySelector('#group[open] .steps')")
        shown = await tab.value("document.getElementById('group').textContent")
        for text in (
            "big red circle on white",
            "iteration 20",
            "+1.500",
            "not trained on",
            "trained by policy gradient",
        ):
            assert text in shown
        assert await tab.value("document.querySelectorAll('#group figure').length") == 4
        await tab.click("#group .close")
        await tab.value(
            "(s => { s.value = 'alignment-000000'; s.dispatchEvent(new Event('change', {bubbles: true})); })"
            "(document.getElementById('iterations'))"
        )
        await tab.until("document.querySelector('.group').dataset.group.includes('alignment-000000')")
        assert tab.failures == []
        assert all(request.startswith((url, "data:")) for request in tab.requests)

    with live_page(run_dir, "127.0.0.1", 0, "dashboard") as url:
        browser.run(lambda tab: look(tab, url))


def test_the_page_asks_for_its_token(browser: Browser, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DASHBOARD_TOKEN, "0123456789abcdef")

    async def enter(tab: Tab, url: str) -> None:
        for token, expected in (("wrong", "This is not the token"), ("0123456789abcdef", "The run has finished")):
            await tab.open(url)
            await tab.until("document.querySelector('input[name=token]')")
            assert "RTDMD" not in await tab.value("document.title")
            await tab.value(f"document.querySelector('input').value = '{token}'")
            await tab.value("document.querySelector('form').submit()")
            await tab.until(f"document.body.textContent.includes('{expected}')")
        assert all("0123456789abcdef" not in request for request in tab.requests)

    with live_page(run_dir, "127.0.0.1", 0, "dashboard") as url:
        browser.run(lambda tab: enter(tab, url))
