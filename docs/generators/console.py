"""Takes the pictures of the console in `docs/console/`, with Chromium; a minute.

python -m docs.generators.console
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from playwright.sync_api import Browser, sync_playwright

from scumble.evaluation.local_server import serving

DOCS = Path(__file__).parent.parent
OUT, DIGITS = DOCS / "console", sorted((DOCS / "digits").glob("*.png"))
SETTINGS = {"model": "mnist", "precision": "int8", "workers": 2, "defense": "codebook"}
WATCHED_S = 40  # with requests, so that the charts show some
EVERY_S = 0.025
SHOWN = 3  # a golden input of which the network is unsure: the defense changes its answer visibly
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 1000}


def main() -> None:
    """Write desktop.png and phone.png."""
    with serving(**SETTINGS) as server, sync_playwright() as driver, asked(server.url):
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("chromium-browser"),
            args=["--no-sandbox", "--disable-gpu"],
        )
        take(browser, server.admin, "desktop", DESKTOP, "light", full_page=True, seconds=WATCHED_S)
        take(browser, server.admin, "phone", PHONE, "dark", full_page=False, seconds=5)
        browser.close()


@contextmanager
def asked(url: str) -> Iterator[None]:
    """Send digits one by one in the meantime."""
    over = threading.Event()

    def ask() -> None:
        with httpx2.Client(headers={"Content-Type": "image/png"}, trust_env=False) as client:
            while not over.wait(EVERY_S):
                digit = DIGITS[int(time.monotonic() / EVERY_S) % len(DIGITS)]
                client.post(f"{url}/v1/predict", content=digit.read_bytes())

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def take(
    browser: Browser,
    url: str,
    name: str,
    size: dict[str, int],
    scheme: str,
    *,
    full_page: bool,
    seconds: float,
) -> None:
    """Show a golden input on the page, and take a picture of it after some time."""
    page = browser.new_page(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]  # typed dicts
    page.goto(url)
    page.locator("#golden button").nth(SHOWN).click()
    page.locator("#bars li").first.wait_for(timeout=60_000)
    page.wait_for_timeout(1000 * seconds)
    page.screenshot(path=OUT / f"{name}.png", full_page=full_page)
    page.close()


if __name__ == "__main__":
    main()
