"""The page in a real browser: what is typed, what appears, what goes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.integration.emulator.conftest import KEY, Site, site_with

# What keeps a browser on a closed network from looking for its maker's hosts.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
WAIT_MS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    found = next((path for path in map(shutil.which, filter(None, names)) if path), None)
    if found is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing("the page is tested in Chromium: run `make browser`, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the browser has complained of: errors, and requests that leave the emulator."""
    return []


@pytest.fixture
def page(browser: Browser, complaints: list[str]) -> Iterator[Page]:
    # The certificate of an emulator that speaks TLS is not one that a browser knows.
    opened = browser.new_page(viewport={"width": 1280, "height": 900}, ignore_https_errors=True)
    opened.set_default_timeout(WAIT_MS)
    opened.add_init_script(f"sessionStorage.setItem('key', '{KEY}')")
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    yield opened
    opened.close()


@pytest.fixture
def asleep() -> Iterator[Site]:
    """An emulator that starts a worker when a job waits, and stops it after two seconds without one."""
    with site_with(idleTimeout=2, scalerValue=4, env={"CONCURRENCY": "4", "PAUSE_S": "0.1"}) as site:
        yield site


def test_a_chat_streams_from_a_worker_that_appears_and_goes(page: Page, asleep: Site, complaints: list[str]) -> None:
    page.on("request", lambda one: None if one.url.startswith(asleep.url) else complaints.append(one.url))
    page.goto(asleep.url)
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    expect(page.get_by_text("None runs.")).to_be_visible()

    page.get_by_label("Message").focus()
    page.keyboard.type("COUNT x 30")
    page.keyboard.press("Enter")

    expect(page.locator(".worker .state")).to_have_text(re.compile("initializing|running"), timeout=WAIT_MS)
    answer = page.locator(".message.assistant")
    expect(answer).to_contain_text("3 4 5", timeout=WAIT_MS)
    assert "29" not in answer.inner_text()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(answer).to_contain_text("28 29", timeout=WAIT_MS)
    expect(answer).to_contain_text("first token")
    expect(page.locator("#jobs tr", has_text="/v1/chat/completions").locator(".state")).to_have_text("COMPLETED")
    expect(page.locator(".worker .state")).to_have_text("idle")
    expect(page.locator(".worker pre")).to_contain_text("Finished")
    expect(page.locator(".worker")).to_have_count(0, timeout=WAIT_MS)
    page.locator("#gone-box > summary").click()
    expect(page.locator("#gone")).to_contain_text("idle for 2 s")
    assert complaints == []


def test_a_job_is_cancelled_from_the_page(page: Page, asleep: Site, complaints: list[str]) -> None:
    page.goto(asleep.url)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "sleep 60"}]}
    job = asleep.submit({"openai_route": "/v1/chat/completions", "openai_input": chat})
    row = page.locator("#jobs tr", has_text=job[:8])
    expect(row.locator(".state")).to_have_text("IN_PROGRESS", timeout=WAIT_MS)

    row.get_by_role("button", name="Cancel").focus()
    page.keyboard.press("Enter")

    expect(row.locator(".state")).to_have_text("CANCELLED")
    expect(row.get_by_role("button")).to_be_hidden()
    assert asleep.status(job)["status"] == "CANCELLED"
    assert complaints == []


def test_an_answer_is_stopped_and_its_job_with_it(page: Page, site: Site) -> None:
    page.goto(site.url)
    page.get_by_label("Message").fill("COUNT x 2000")
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant").last).to_contain_text("1 2 3")

    page.get_by_role("button", name="Stop").click()

    expect(page.locator("#jobs tr", has_text="CANCELLED")).to_have_count(1)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_an_error_is_told_in_the_apis_own_words(page: Page, site: Site) -> None:
    page.goto(site.url)
    page.get_by_text("Options").click()
    page.get_by_label("API key").fill("wrong")
    page.get_by_label("Message").fill("hello")
    page.keyboard.press("Enter")

    expect(page.locator(".message.error")).to_contain_text("API key")


def test_the_page_says_when_the_emulator_is_gone(page: Page) -> None:
    with site_with() as short:
        page.goto(short.url)
        expect(page.get_by_text("live", exact=True)).to_be_visible()

    expect(page.get_by_text("disconnected")).to_be_visible()


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_overflows_at_any_width(page: Page, site: Site, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(site.url)
    expect(page.locator(".worker")).to_have_count(1)

    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_it_is_dark_where_the_reader_wants_it_dark(page: Page, site: Site) -> None:
    page.goto(site.url)
    brightness = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness.append(sum(map(int, re.findall(r"\d+", colour))) / 3)

    assert brightness[0] > 200
    assert brightness[1] < 60


def test_a_chat_streams_over_https(page: Page, complaints: list[str]) -> None:
    with site_with(tls=True, workersMin=1, env={"PAUSE_S": "0.1"}) as site:
        page.goto(site.url)
        expect(page.locator(".worker .state")).to_have_text("idle", timeout=WAIT_MS)
        page.get_by_label("Message").fill("COUNT x 20")
        page.keyboard.press("Enter")

        answer = page.locator(".message.assistant")
        expect(answer).to_contain_text("3 4 5")
        assert "19" not in answer.inner_text()
        expect(answer).to_contain_text("18 19")
        expect(page.locator("#jobs tr", has_text="/v1/chat/completions").locator(".state")).to_have_text("COMPLETED")
        assert complaints == []


def test_text_from_outside_is_never_markup(page: Page, site: Site) -> None:
    page.goto(site.url)
    page.get_by_label("Message").fill("<img src=x onerror=document.title='broken'>")
    page.keyboard.press("Enter")

    expect(page.locator(".message.user").last).to_have_text("<img src=x onerror=document.title='broken'>")
    assert page.locator("#messages img").count() == 0
