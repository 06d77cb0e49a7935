"""The web page in a real browser."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.integration.emulator.conftest import KEY, Site, site_with

# Without these, the browser tries to reach its vendor's servers, which a closed network blocks.
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
def browser_errors() -> list[str]:
    """Errors that the browser has reported, and requests to other hosts."""
    return []


@pytest.fixture
def page(browser: Browser, browser_errors: list[str]) -> Iterator[Page]:
    # The browser does not trust the CA of an emulator with TLS.
    opened = browser.new_page(viewport={"width": 1280, "height": 900}, ignore_https_errors=True)
    opened.set_default_timeout(WAIT_MS)
    opened.add_init_script(f"sessionStorage.setItem('key', '{KEY}')")
    opened.on("pageerror", lambda error: browser_errors.append(str(error)))
    opened.on("console", lambda message: browser_errors.append(message.text) if message.type == "error" else None)
    yield opened
    opened.close()


@pytest.fixture
def scaled_to_zero() -> Iterator[Site]:
    """An emulator without workers: it starts one when a job has waited, and stops it after two idle seconds."""
    with site_with(idleTimeout=2, scalerValue=4, env={"CONCURRENCY": "4", "PAUSE_S": "0.1"}) as site:
        yield site


def test_a_chat_message_starts_a_worker_streams_its_response_and_the_idle_worker_stops(
    page: Page, scaled_to_zero: Site, browser_errors: list[str]
) -> None:
    page.on(
        "request",
        lambda request: None if request.url.startswith(scaled_to_zero.url) else browser_errors.append(request.url),
    )
    page.goto(scaled_to_zero.url)
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    expect(page.get_by_text("No workers.")).to_be_visible()

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
    page.locator("#exited-box > summary").click()
    expect(page.locator("#exited")).to_contain_text("idle for 2 s")
    assert browser_errors == []


def test_the_cancel_button_cancels_a_job(page: Page, scaled_to_zero: Site, browser_errors: list[str]) -> None:
    page.goto(scaled_to_zero.url)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "sleep 60"}]}
    job = scaled_to_zero.submit({"openai_route": "/v1/chat/completions", "openai_input": chat})
    row = page.locator("#jobs tr", has_text=job[:8])
    expect(row.locator(".state")).to_have_text("IN_PROGRESS", timeout=WAIT_MS)

    row.get_by_role("button", name="Cancel").focus()
    page.keyboard.press("Enter")

    expect(row.locator(".state")).to_have_text("CANCELLED")
    expect(row.get_by_role("button")).to_be_hidden()
    assert scaled_to_zero.status(job)["status"] == "CANCELLED"
    assert browser_errors == []


def test_the_stop_button_stops_the_response_and_cancels_its_job(page: Page, site: Site) -> None:
    page.goto(site.url)
    page.get_by_label("Message").fill("COUNT x 2000")
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant").last).to_contain_text("1 2 3")

    page.get_by_role("button", name="Stop").click()

    expect(page.locator("#jobs tr", has_text="CANCELLED")).to_have_count(1)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_an_api_error_is_shown_with_its_message(page: Page, site: Site) -> None:
    page.goto(site.url)
    page.get_by_text("Options").click()
    page.get_by_label("API key").fill("wrong")
    page.get_by_label("Message").fill("hello")
    page.keyboard.press("Enter")

    expect(page.locator(".message.error")).to_contain_text("API key")


def test_the_page_shows_when_the_connection_is_lost(page: Page) -> None:
    with site_with() as short:
        page.goto(short.url)
        expect(page.get_by_text("live", exact=True)).to_be_visible()

    expect(page.get_by_text("disconnected")).to_be_visible()


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_does_not_overflow_at_any_width(page: Page, site: Site, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(site.url)
    expect(page.locator(".worker")).to_have_count(1)

    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_follows_the_preferred_color_scheme(page: Page, site: Site) -> None:
    page.goto(site.url)
    brightness = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness.append(sum(map(int, re.findall(r"\d+", color))) / 3)

    assert brightness[0] > 200
    assert brightness[1] < 60


def test_a_chat_response_streams_over_https(page: Page, browser_errors: list[str]) -> None:
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
        assert browser_errors == []


def test_messages_are_not_interpreted_as_html(page: Page, site: Site) -> None:
    page.goto(site.url)
    page.get_by_label("Message").fill("<img src=x onerror=document.title='broken'>")
    page.get_by_label("Message").press("Enter")

    expect(page.locator(".message.user").last).to_have_text("<img src=x onerror=document.title='broken'>")
    assert page.locator("#messages img").count() == 0
