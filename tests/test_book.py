"""The book in a real browser, after `make book`: every page, the search, a stepper inside a page, what axe finds."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import BROWSER, DRIVER, Browser, browser

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "build" / "book"
PAGES = sorted(path for path in BOOK.rglob("*.html") if "steppers" not in path.parts)
LOOKED_AT = ("index.html", "lessons/05_block_table.html", "side_by_side.html", "reference.html", "glossary.html")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PAGES, reason="make book was not run"),
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed"),
]


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


def test_every_lesson_and_file_of_the_reading_path_has_a_page() -> None:
    lessons = {path.stem for path in (ROOT / "lessons").glob("[0-9][0-9]_*.py")}
    assert {path.stem for path in (BOOK / "lessons").glob("[0-9]*.html")} == lessons
    assert len(list((BOOK / "core").glob("core-*.html"))) == 11


def test_the_book_is_small_and_asks_no_other_host() -> None:
    assert sum(path.stat().st_size for path in BOOK.rglob("*") if path.is_file()) < 20e6
    for page in PAGES:
        loaded = re.findall(
            r'<(?:script|img|iframe|link)[^>]* (?:src|href)="([^"]*)"', page.read_text(encoding="utf-8")
        )
        assert [address for address in loaded if re.match(r"(https?:)?//", address)] == [], page


def test_no_page_holds_a_path_of_the_machine_that_built_it() -> None:
    for page in BOOK.rglob("*.html"):
        assert str(ROOT) not in page.read_text(encoding="utf-8"), page


def test_every_page_loads_without_an_error_or_a_request_to_another_host(window: Browser) -> None:
    window.errors()
    for page in PAGES:
        window.go(page.as_uri())
        window.wait("document.readyState === 'complete'")
        fetched = window.run("performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert [address for address in fetched if not address.startswith("file:")] == [], page
        assert window.errors() == [], page


def test_the_search_finds_the_block_table(window: Browser) -> None:
    window.go(f"{(BOOK / 'search.html').as_uri()}?q=block+table")
    window.wait("document.querySelectorAll('#search-results li a').length > 5")
    found = window.run(
        "[...document.querySelectorAll('#search-results li a')].map((link) => link.getAttribute('href'))"
    )
    assert any("lessons/05_block_table" in link for link in found)


def test_a_stepper_inside_a_page_opens_at_its_moment_and_steps(window: Browser) -> None:
    window.go((BOOK / "index.html").as_uri())
    window.enter("iframe.stepper")
    window.wait("document.getElementById('picture').textContent")
    assert "preempted by swap" in window.text("sentence")
    before = window.text("where")
    window.run("document.querySelector('button').focus()")
    window.press("right")
    window.wait(f"document.getElementById('where').textContent !== {before!r}")


def test_every_stepper_opens_at_a_moment_that_is_there(window: Browser) -> None:
    found = set()
    for page in PAGES:
        found |= set(
            re.findall(r'<iframe class="stepper" src="(?:\.\./)?(steppers/[^"]*)"', page.read_text(encoding="utf-8"))
        )
    assert len(found) > 5
    for address in sorted(found):
        window.go(f"{BOOK.as_uri()}/{html.unescape(address)}")
        window.wait("document.getElementById('picture').textContent")
        assert window.text("problem") == "", address


def test_the_keyboard_alone_opens_an_answer(window: Browser) -> None:
    window.go((BOOK / "lessons" / "05_block_table.html").as_uri())
    for _ in range(150):
        window.press("tab")
        if window.run("document.activeElement.matches('details.question > summary')"):
            break
    else:
        raise AssertionError("Tab never comes to a question")
    window.press("enter")
    assert window.run("document.activeElement.parentElement.open")
    assert "It is 3 blocks" in window.run("document.activeElement.parentElement.textContent")


def test_a_link_beside_a_line_of_the_kernel_shows_the_access_of_that_line(window: Browser) -> None:
    window.go((BOOK / "side_by_side.html").as_uri())
    line = "[...document.querySelectorAll('.beside a')].find((link) => link.textContent.startsWith('slot = slot_of'))"
    address = window.run(f"{line}.href")
    window.go(address)
    window.wait("document.getElementById('picture').textContent")
    assert "table" in window.text("sentence")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", LOOKED_AT)
def test_axe_finds_no_fault(window: Browser, page: str, theme: str) -> None:
    axe = pytest.importorskip("axe_core_python", reason="needs the extra book")
    script = Path(axe.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    window.go((BOOK / page).as_uri())
    window.wait("document.readyState === 'complete'")
    window.run(f"document.body.dataset.theme = '{theme}'")
    asks = "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa'], iframes: false})"
    answer = window.run_async(f"{script}; const done = arguments[0]; {asks}.then((found) => done(found.violations))")
    faults = [(fault["id"], [node["html"][:200] for node in fault["nodes"][:3]]) for fault in answer]
    assert faults == []
