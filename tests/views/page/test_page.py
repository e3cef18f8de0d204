"""The page of a run: what it holds is what the frames show, and a real browser moves through it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import BROWSER, DRIVER, Browser, browser

from paged_ref.cli import main
from paged_ref.timeline.events import Event, write_events
from paged_ref.timeline.history import read_histories
from paged_ref.views.common.canvas import exactly
from paged_ref.views.viz.frames.screen import FRAMES
from paged_ref.views.viz.narration import narrate
from paged_ref.views.viz.scene import Scene

LENGTHS = {"paged": 24, "standard": 12}  # events of the runs: up to the first copy on write


@pytest.fixture(scope="module")
def short_log(logs: dict[str, list[Event]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "run.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for name, length in LENGTHS.items():
            write_events(logs[name][: length + 40], file)  # names of tokens are no moments
    return path


@pytest.fixture(scope="module")
def page(short_log: Path) -> Path:
    path = short_log.with_name("it's a run.html")
    assert main(["viz", str(short_log), "--html", str(path), "--at", "C"]) == 0
    return path


def unpacked(page: Path) -> Any:
    (packed,) = re.findall(r'id="data">([^<]+)<', page.read_text(encoding="utf-8"))
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_the_page_holds_each_frame_of_each_event(page: Path, short_log: Path) -> None:
    data = unpacked(page)
    runs = read_histories(short_log)
    assert [run["name"] for run in data["runs"]] == ["paged", "standard"]
    for run, kept in zip(runs, data["runs"], strict=True):
        assert kept["steps"] == run.step_positions
        assert [sentence.split("\n")[0] for sentence in kept["sentences"]] == [
            narrate(run.moment(position)) for position in range(len(run))
        ]
        for position in range(0, len(run), 5):
            scene = Scene(run.moment(position), runs, hints=False)
            for frame, of_page in zip(FRAMES, kept["frames"], strict=True):
                shown = data["pictures"][of_page["pictures"][position]]
                text = ["".join(data["rows"][row][::2]).rstrip() for row in shown]
                drawn = [exactly(row, 100).plain.rstrip() for row in frame.draw(scene, 100, 24)]
                assert text == [*drawn, *[""] * (24 - len(drawn))]


def test_the_page_needs_no_other_file(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"https?:|<script [^>]*src|<link|<img|@import|url\(", text)
    assert "$" not in re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL)
    assert text.count("aria-label") >= 5
    assert len(text) < 40_000


def test_a_log_with_too_many_events_is_refused(
    short_log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("paged_ref.views.viz.viz_page.MOST", 5)
    path = short_log.with_name("none.html")
    assert main(["viz", str(short_log), "--html", str(path)]) == 2
    assert "events are in the log; at most 5 fit on a page" in capsys.readouterr().err
    assert not path.exists()


@pytest.fixture(scope="module")
def walk_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("greenlet", reason="the tracer runs CUDA threads on greenlets")
    path = tmp_path_factory.mktemp("page") / "walk.html"
    sizes = ["--tokens", "2", "--heads", "1", "--head-size", "2", "--threads", "2", "--block-size", "2"]
    assert main(["walk", *sizes, "--html", str(path)]) == 0
    return path


def test_the_walk_has_both_kernels(walk_page: Path) -> None:
    data = unpacked(walk_page)
    naive, paged = data["runs"]
    assert len(naive["sentences"]) == len(paged["sentences"]) > 50
    (at,) = (position for position, mark in paged["marks"] if mark == "block_tables")
    assert "says block" in paged["sentences"][at]
    assert "No table" in naive["sentences"][at]
    assert paged["sentences"][data["start"]["position"]].startswith("Scores: thread 0 owns key 0")
    (walk, threads, layouts) = paged["frames"]
    assert len({len(each["pictures"]) for each in (walk, threads, layouts)}) == 1
    rows = ["".join(data["rows"][row][::2]) for row in data["pictures"][walk["pictures"][at]]]
    assert any(row.startswith("▶") and "slot_of(block_tables" in row for row in rows)


# --- in a browser -----------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(not (DRIVER and BROWSER), reason="chromium and chromedriver are not installed")


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@needs_browser
@pytest.mark.slow
def test_keys_and_buttons_move_through_the_run(window: Browser, page: Path, tmp_path: Path) -> None:
    (run, _) = unpacked(page)["runs"]
    copy = next(position for position, mark in run["marks"] if mark == "C")
    window.open(page)
    assert window.text("sentence") == run["sentences"][copy]  # it opens at --at
    assert window.run("document.getElementById('picture').innerText.split('\\n').length") >= 24
    for key, position in (
        ("right", copy + 1), ("left", copy), ("left", copy - 1), ("home", 0), ("left", 0),
        ("down", run["steps"][0]), ("down", run["steps"][1]), ("up", run["steps"][0]), ("n", run["marks"][0][0]),
        ("end", len(run["sentences"]) - 1), ("right", len(run["sentences"]) - 1),
    ):  # fmt: skip
        window.press(key)
        assert window.text("sentence") == run["sentences"][position], key
        assert f"event {position + 1} of {len(run['sentences'])}" in window.text("where")
    window.run("document.querySelector('[data-key=ArrowUp]').click()")
    assert window.text("sentence").startswith("Step ")
    window.press("2")
    assert "Which sequences share which blocks" in window.text("picture")
    window.press("r")
    assert window.run("document.getElementById('run').selectedOptions[0].text") == "standard"
    window.wait("location.hash.startsWith('#run=standard&frame=sharing&step=')")  # the address follows
    window.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert window.errors() == []


@needs_browser
@pytest.mark.slow
def test_the_address_says_what_is_shown(window: Browser, page: Path) -> None:
    (paged, standard) = unpacked(page)["runs"]
    window.open(page, "#step=1")
    assert window.text("where").startswith("step 1 ")
    assert window.text("sentence") == paged["sentences"][paged["steps"][1]]
    window.run("location.hash = '#run=standard&frame=5&event=3'")  # as a link on the page, or the history, would
    window.wait("document.getElementById('where').textContent.includes('event 3 of')")
    assert window.text("sentence") == standard["sentences"][2]
    assert "standard: 48 slots" in window.text("picture")
    window.open(page, "#at=F&embed")
    assert "forks off" in window.text("sentence")
    assert window.run("getComputedStyle(document.querySelector('header')).display") == "none"
    window.open(page, "#step=99&frame=nine")
    assert window.text("problem").startswith("frame is nine; known are tables, sharing, ")
    assert "step is 99; 0 to " in window.text("problem")
    assert window.errors() == []


@needs_browser
@pytest.mark.slow
def test_the_page_is_readable_for_everyone(window: Browser, page: Path) -> None:
    """In light and in dark; without colour and on paper, where the marks and the bold letters stay; with keys alone."""
    grounds = []
    for scheme in ("light", "dark"):
        window.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        window.open(page)
        grounds.append(window.run("getComputedStyle(document.body).backgroundColor"))
        assert window.run(CONTRASTS) >= 4.5, scheme  # WCAG AA
    assert grounds[0] != grounds[1]
    window.devtools("Emulation.setEmulatedMedia", media="print", features=[])
    assert window.run("getComputedStyle(document.querySelector('#picture .reverse')).textDecorationLine") == "underline"
    assert window.run("getComputedStyle(document.getElementById('move')).display") == "none"
    window.devtools("Emulation.setEmulatedMedia", media="", features=[])
    assert window.run("document.getElementById('sentence').getAttribute('aria-live')") == "polite"
    window.press("tab", "tab", "tab", "enter")  # the run, the first frame, the second
    assert window.run("document.activeElement.textContent") == "2 sharing"
    assert window.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    window.press(" ")  # a key that presses the button which has the focus does not play
    assert window.text("play") == "play"


@needs_browser
@pytest.mark.slow
def test_another_page_can_embed_a_moment(window: Browser, page: Path) -> None:
    outer = page.with_name("book.html")
    window.open(page, "#step=1")
    outer.write_text(f"<!DOCTYPE html><title>A book</title>{window.text('embed')}", encoding="utf-8")
    window.open(outer)
    window.enter("iframe")
    window.wait("document.getElementById('picture').textContent")
    assert window.text("where").startswith("step 1 ")
    assert window.run("getComputedStyle(document.querySelector('header')).display") == "none"
    before = window.text("where")
    window.run("document.querySelector('[data-key=ArrowRight]').click()")
    assert window.text("where") != before
    assert window.errors() == []


@needs_browser
@pytest.mark.slow
def test_the_walk_in_a_browser(window: Browser, walk_page: Path) -> None:
    window.open(walk_page, "#run=paged&at=block_tables")
    assert "This read is all that paging adds." in window.text("sentence")
    window.press("r")
    assert "No table" in window.text("sentence")
    window.press("3", "n")
    assert window.run("document.querySelector('[aria-pressed=true]').textContent") == "3 layouts"
    (naive, _) = unpacked(walk_page)["runs"]
    window.open(walk_page, "#run=naive&step=2")  # lines of the kernel are numbered from 1
    assert window.text("sentence") == naive["sentences"][naive["steps"][1]]
    assert window.errors() == []


CONTRASTS = """(() => {  // the least contrast of a part of the picture with its ground
  const light = (colour) => colour.match(/[0-9.]+/g).slice(0, 3).map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = getComputedStyle(document.body).backgroundColor;
  const names = [...document.styleSheets[0].cssRules].map((rule) => rule.selectorText || "")
    .flatMap((text) => text.match(/[.][a-z_]+/g) || []).map((name) => name.slice(1));
  return Math.min(...["", ...names].map((name) => {
    const part = document.createElement("span");
    part.className = name;
    document.getElementById("picture").append(part);
    const style = getComputedStyle(part);
    const own = style.backgroundColor === "rgba(0, 0, 0, 0)" ? ground : style.backgroundColor;
    const both = [light(style.color), light(own)].sort((a, b) => b - a);
    return (both[0] + 0.05) / (both[1] + 0.05);
  }));
})()"""
