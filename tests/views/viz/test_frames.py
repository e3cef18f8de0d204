"""Frames as text: golden files at three sizes, every frame at every event, large pools, no colour alone."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console
from rich.text import Text
from support.logged_managers import logged_paged

import paged_ref
from paged_ref.core.checks import plural
from paged_ref.core.engine.engine import Engine
from paged_ref.core.engine.scheduler import Scheduler
from paged_ref.extras.prefix_cache import CachingBlockPool
from paged_ref.timeline.events import Event, SequenceFreed, TokenNamed
from paged_ref.timeline.history import History, histories
from paged_ref.views.common import canvas
from paged_ref.views.common.bars import PARTS, USAGE
from paged_ref.views.viz import source_links
from paged_ref.views.viz.frames import screen
from paged_ref.views.viz.frames.screen import FRAMES, SMALLEST
from paged_ref.views.viz.narration import narrate
from paged_ref.views.viz.scene import Scene
from paged_ref.views.viz.source_links import Place, ended, function_for_event, place_of

PACKAGE = Path(paged_ref.__file__).parent
GOLDEN = Path(__file__).parent / "golden"
SIZES = ((80, 24), (100, 30), (160, 50))
# For each frame the run, and the mark of the first event that it is about.
SHOWN = {"tables": (0, "S"), "sharing": (0, "C"), "swap": (0, "S"), "prefix": (0, "H"), "memory": (0, "E"),
         "timeline": (0, "R"), "tables-standard": (1, "N"), "swap-swapping": (2, "S")}  # fmt: skip


def draw(runs: Sequence[History], frame: int, position: int, size: tuple[int, int], run: int = 0) -> list[str]:
    scene = Scene(runs[run].moment(position), runs)
    return screen.screen(scene, frame, *size).plain.split("\n")


def first(run: History, mark: str) -> int:
    return next(position for position, found in run.marks if found == mark)


@pytest.fixture
def steady_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden files must not change with every edit elsewhere: names stay, line numbers and sources do not."""

    def steady(function: source_links.Function) -> Place:
        place = place_of(function)
        return Place(place.file, 1, place.name, (f"def {place.name.rsplit('.')[-1]}(...):", "    ..."))

    monkeypatch.setattr(screen, "place_of", steady)


@pytest.mark.usefixtures("steady_code")
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("shown", SHOWN)
def test_golden(shown: str, size: tuple[int, int], runs: list[History], request: pytest.FixtureRequest) -> None:
    run, mark = SHOWN[shown]
    names = [frame.name for frame in FRAMES]
    lines = draw(runs, names.index(shown.split("-")[0]), first(runs[run], mark), size, run)
    assert len(lines) == size[1]
    assert {cell_len(line) for line in lines} == {size[0]}
    text = "".join(line.rstrip() + "\n" for line in lines)
    file = GOLDEN / f"viz_{shown}_{size[0]}x{size[1]}.txt"
    if request.config.getoption("--update-golden"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), "pytest --update-golden writes it anew; then look at the diff"


def test_every_frame_at_every_event_fills_its_window_and_is_a_pure_function(runs: list[History]) -> None:
    for run in range(len(runs)):
        for position in range(len(runs[run])):
            frame = position % len(FRAMES)
            size = ((80, 24), SMALLEST, (97, 33), (141, 61))[position % 4]
            lines = draw(runs, frame, position, size, run)
            assert (len(lines), {cell_len(line) for line in lines}) == (size[1], {size[0]})
            assert draw(runs, frame, position, size, run) == lines


@pytest.mark.parametrize("size", [(1, 1), (10, 3), (59, 24), (80, 15), (200, 2)])
def test_a_window_that_is_too_small_says_what_is_needed(runs: list[History], size: tuple[int, int]) -> None:
    lines = draw(runs, 0, 5, size)
    assert (len(lines), {cell_len(line) for line in lines}) == (size[1], {size[0]})
    if size[0] > 50:
        assert "at least {}x{} is needed".format(*SMALLEST) in " ".join(lines)


def test_a_state_at_80x24_shows_the_essentials(runs: list[History]) -> None:
    """The copy on write of the paper's Figure 8, as the pool shows it."""
    text = draw(runs, 0, first(runs[0], "C"), (80, 24))
    row = next(line for line in text if " C  2 " in line)
    assert "×0→×1 B1" in row  # its count rises from 0
    assert "▸" in row  # the slot that was given out
    assert any("↓  0 ×2→×1 B2" in line for line in text)  # the other's count falls
    assert any("Copy on write: B1 is to write into block 0, which B2 needs as it is." in line for line in text)
    assert any("paged_ref/core/memory/paged.py:" in line and "PagedManager.append" in line for line in text)
    assert any("Free, next first: 4 5 6 8" in line for line in text)


def test_nothing_is_said_by_colour_alone(runs: list[History]) -> None:
    """The same letters with colour and without; NO_COLOR leaves bold and reverse, which are no colours."""
    picture = screen.screen(Scene(runs[0].moment(first(runs[0], "S")), runs), 4, 100, 30)
    for no_color in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=True, color_system="256", width=100, no_color=no_color)
        console.print(picture, no_wrap=True, overflow="crop")
        drawn = file.getvalue()
        assert Text.from_ansi(drawn).plain.rstrip() == picture.plain.rstrip()
        assert ("\x1b[38;5;28m" in drawn) is not no_color  # green4
    assert len({PARTS[part].mark for part in USAGE}) == len(USAGE)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 150])
def test_frames_lose_nothing_silently(runs: list[History], width: int) -> None:
    """Each row fits as it is drawn (but shares in percent, which end in …); each sequence and each block is there, or
    a line says how many more there are."""
    for run in runs:
        for position in [position for position, _ in run.marks][::3]:
            moment = run.moment(position)
            for frame in FRAMES:
                rows = frame.draw(Scene(moment, runs), width, 14 if width < 80 else 20)
                assert len(rows) <= (14 if width < 80 else 20), frame.name
                widest = max(row.cell_len for row in rows)
                assert widest <= width or (frame.name == "memory" and width <= 80), (frame.name, position)
                text = "\n".join(row.plain for row in rows)
                if frame.name in ("tables", "timeline"):
                    live = [run.name(v.seq_id) for v in moment.state.sequences.values() if v.status != "finished"]
                    lost = [name for name in live if not re.search(rf"\b{name}\b", text)]
                    more = sum(map(int, re.findall(r"… (\d+) more", text)))
                    assert len(lost) <= more or re.search(r"sequences \d+-\d+ of", text), (frame.name, lost)
                if frame.name == "tables" and moment.state.memory.paged and width >= 80:
                    for block in range(moment.state.memory.num_blocks):
                        assert re.search(rf"^.* {block} (×|free|cached)", text, re.MULTILINE), block


def test_where_not_all_runs_fit_the_memory_frame_has_the_run_that_is_looked_at(runs: list[History]) -> None:
    for number, run in enumerate(runs):
        rows = draw(runs, 4, 10, SMALLEST, number)
        assert [row for row in rows if f"▶ {run.moment(10).state.memory.manager}: " in row], rows
        assert any("2 more runs" in row for row in rows)


def test_lines_that_do_not_fit_are_counted() -> None:
    rows = [canvas.line(f"row {i}") for i in range(9)]
    assert [row.plain for row in canvas.filled(rows, 3)] == ["row 0", "row 1", " … 7 more lines"]
    assert [row.plain for row in canvas.filled([*rows[:2], canvas.line("")], 2)] == ["row 0", "row 1"]


def test_colours_are_readable_on_white_and_on_black() -> None:
    """At least 3.9 : 1 on both; 4.6 is the most that one colour can have on both."""
    for name in {*canvas.COLOURS, canvas.WARM, *(part.style for part in PARTS.values())} - {"dim"}:
        red, green, blue = (_linear(part / 255) for part in Color.parse(name).get_truecolor())
        light = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        assert min(1.05 / (light + 0.05), (light + 0.05) / 0.05) >= 3.9, name
        assert f".{name} {{" in PACKAGE.joinpath("views", "page", "page.css").read_text(encoding="utf-8")


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4


# --- words and code ---------------------------------------------------------------------------------------


def test_each_event_has_its_sentence_and_its_function(runs: list[History]) -> None:
    for run in runs:
        narrated = set()
        for position in range(len(run)):
            moment = run.moment(position)
            sentence = narrate(moment)
            assert sentence.endswith((".", "…", "”."))
            assert len(sentence.split()) >= 5
            place = place_of(function_for_event(moment))
            source = (PACKAGE.parent / place.file).read_text(encoding="utf-8")
            assert source.splitlines()[place.line - 1].strip() == place.source[0].strip()
            assert f"def {place.name.rsplit('.')[-1]}(" in "".join(place.source)
            narrated.add(type(moment.event))
        assert TokenNamed not in narrated


def test_every_function_that_events_link_to_exists_and_is_public() -> None:
    """Functions are named as strings for the managers: a name that moved must not wait for a screen to fail."""
    names = [done_by for done_by in source_links.DONE_BY.values() if isinstance(done_by, str)]
    functions = [done_by for done_by in source_links.DONE_BY.values() if not isinstance(done_by, str)]
    functions += [Scheduler.schedule, Engine.step, CachingBlockPool.allocate]
    for manager in source_links.MANAGERS.values():
        functions += [getattr(manager, name) for name in names if hasattr(manager, name)]
    for name in names:
        assert any(hasattr(manager, name) for manager in source_links.MANAGERS.values()), name
    for function in functions:
        place = place_of(function)
        assert place.source, function
        name = place.name.rsplit(".")[-1]
        assert name.startswith("__") or not name.startswith("_"), place.name


def test_the_end_of_a_sequence_differs_from_a_preemption(runs: list[History]) -> None:
    (run,) = histories(preempted())
    freed = [i for i, event in enumerate(run.events) if isinstance(event, SequenceFreed)]
    kinds = {ended(run.moment(i)) for i in freed}
    assert kinds == {True, False}
    for i in freed:
        moment = run.moment(i)
        assert ("is at its end" in narrate(moment)) == ended(moment)
        assert ("preempted by recompute" in narrate(moment)) != ended(moment)
    assert ("X", True) in {(mark, True) for _, mark in run.marks}


def preempted() -> list[Event]:
    from paged_ref import LLM, SamplingParams

    events: list[Event] = []
    llm = LLM("tiny", block_size=4, kv_cache_tokens=32, log=events.append)
    llm.generate(["Once upon a time", "The cat", "One day"], SamplingParams(max_tokens=14))
    return events


def test_beams_have_their_sentence_and_their_tree(runs: list[History]) -> None:
    from paged_ref import LLM, SamplingParams

    events: list[Event] = []
    llm = LLM("tiny", block_size=4, kv_cache_tokens=96, log=events.append)
    llm.generate("Four score and seven years ago our", SamplingParams(max_tokens=8, beam_width=4))
    (run,) = histories(events)
    for position, mark in run.marks:
        if mark == "B":
            assert "Beam search keeps the likeliest" in narrate(run.moment(position))
    trees = ["\n".join(draw([run], 1, position, (100, 30))) for position in range(len(run))]
    assert any("├─" in tree and "└─" in tree for tree in trees)
    assert all(name.startswith("A") for name in run.names.values())


# --- large pools -------------------------------------------------------------------------------------------


def test_a_pool_of_ten_thousand_blocks_stays_readable() -> None:
    events: list[Event] = []
    manager = logged_paged(events.append, 10_000, 16, num_host_blocks=5_000, prefix_cache=True)
    for seq_id in range(300):
        tokens = [seq_id, *range(400)]
        manager.admit(seq_id, tokens, 2000)
        manager.append([(seq_id, len(tokens))])
        manager.commit(seq_id, tokens, len(tokens))
    manager.swap_out([7])
    manager.free(8)
    manager.append([(200, 300)])
    (run,) = histories(events)
    for frame in range(len(FRAMES)):
        for size in SIZES:
            lines = draw([run], frame, len(run), size)
            assert {cell_len(line) for line in lines} == {size[0]}
    lines = draw([run], 0, len(run), (80, 24))
    assert any("used, 50 cached, 2,184 free" in line for line in lines)
    assert any("each mark is" in line for line in lines)
    changed = min(block for block in run.moment(len(run)).change.before)
    assert any(re.search(rf"\+ +{changed} ×0→×1 #200 *▸", line) for line in lines)  # it scrolled there


# --- the small parts ---------------------------------------------------------------------------------------


def test_text_in_cells() -> None:
    assert canvas.fit("abc", 5) == "abc  "
    assert canvas.fit("abcdef", 4) == "abc…"
    assert canvas.fit("日本語", 4) == "日 …"
    assert cell_len(canvas.fit("日本語", 5)) == 5
    assert canvas.wrap("one two three", 7) == ["one two", "three"]
    assert canvas.wrap("abcdefghij", 4) == ["abcd", "efgh", "ij"]
    assert canvas.pack(["a", "bb", "c"], 7) == ["a   bb", "c"]
    assert canvas.window(100, 10, 0) == (0, 10)
    assert canvas.window(100, 10, 99) == (90, 100)
    assert canvas.window(100, 10, -7) == (0, 10)
    assert canvas.in_words(["A"]) == "A"
    assert canvas.in_words(["A", "B", "C"]) == "A, B and C"
    assert [plural(n, "entry") for n in (1, 2)] == ["1 entry", "2 entries"]
    assert [canvas.size_of(n) for n in (5, 9216, 12288, 20 * 2**20)] == [
        "5 bytes",
        "9,216 bytes",
        "12.0 KiB",
        "20.0 MiB",
    ]
    assert canvas.brief(["A", "B1", "B2"], 4) == "A+2"
    assert canvas.listing("Free:", [1, 2, 3], 20).plain == "Free: 1 2 3"
    assert canvas.listing("Free:", range(100), 24).plain == "Free: 0 1 2 3 … 96 more"
    assert canvas.listing("Free:", [], 20).plain == "Free: none"
