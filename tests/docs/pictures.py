"""Pictures of the real report and the real browser page for the site: `python -m tests.docs.pictures docs/pictures`. Without a demo run or a browser it says so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.browser import chromium, served
from runtime.errors import ClipError

REPORT, SITE = Path("out/demo/report.html"), Path("out/web")


def main(out: Path) -> int:
    """Take what can be taken."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with chromium() as launch:
            browser = launch()
            if REPORT.is_file():
                page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
                page.goto(REPORT.resolve().as_uri())
                page.screenshot(path=out / "report.png")
            if (SITE / "index.html").is_file():
                with served(SITE) as address:
                    _page(browser, address, out)
            browser.close()
    except ClipError as error:
        print(f"no pictures: {error}")
    for path, made in ((REPORT, "report"), (SITE / "index.html", "page")):
        print(f"{made}: {'taken' if (out / f'{made}.png').is_file() else f'not taken, {path} is not there'}")
    return 0


def _page(browser: Any, address: str, out: Path) -> None:
    page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
    page.goto(address)
    page.wait_for_function("() => document.documentElement.dataset.ready", timeout=60_000)
    page.locator("input[type=search], input[type=text]").first.fill("two red hearts")
    page.wait_for_timeout(3000)
    page.screenshot(path=out / "page.png")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
