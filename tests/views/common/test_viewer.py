"""The keys that every view shares."""

from __future__ import annotations

from rich.text import Text

from paged_ref.views.common.viewer import SPEEDS, Viewer, help_pages


class Pages(Viewer):
    """Three positions."""

    thing = "pages"
    num_positions = 3

    def draw(self, width: int, height: int) -> Text:
        return Text(f"{self.position}")


def test_keys_move_within_the_positions() -> None:
    pages = Pages(speed=2)
    seen = []
    for key in ("left", "right", "right", "right", "home", "end", "left"):
        assert pages.press(key)
        seen.append(pages.position)
    assert seen == [0, 1, 2, 2, 0, 2, 1]


def test_playing_ends_at_the_last_position_and_begins_again() -> None:
    pages = Pages(speed=2)
    pages.tick()
    assert pages.position == 0
    pages.press(" ")
    for _ in range(5):
        pages.tick()
    assert (pages.position, pages.playing) == (2, False)
    pages.press(" ")
    assert (pages.position, pages.playing) == (0, True)


def test_speed_help_and_quit() -> None:
    pages = Pages(speed=2)
    pages.press("+")
    assert (SPEEDS[pages.speed], pages.message) == (4, "4 pages in a second")
    for _ in SPEEDS:
        pages.press("-")
    assert SPEEDS[pages.speed] == SPEEDS[0]
    pages.press("?")
    assert pages.helping
    assert pages.press("q")  # any key leaves the help
    assert not pages.helping
    assert pages.press("unknown")
    assert not pages.press("q")


def test_help_has_a_line_for_each_key() -> None:
    (only,) = help_pages([{"Keys": [("q", "quit"), ("space", "play,  pause"), ("1", ["one", "1"])]}], 24, 9)
    assert [row.plain for row in only] == [
        "── Keys ────────────────",
        " q         quit",
        " space     play,  pause",
        " 1         one   1",
    ]


def test_help_that_does_not_fit_has_more_pages_and_loses_no_word() -> None:
    class Wordy(Pages):
        help = ({"Keys": [("q", "quit, and give the terminal back as it was")]}, {"Words": [("lane", "one thread")]})

        def draw(self, width: int, height: int) -> Text:
            return self.draw_help(width, height)

    pages, seen = Wordy(speed=2), ""
    pages.press("?")
    for number in (1, 2, 3):
        assert pages.helping == number
        shown = pages.draw(46, 3).plain
        assert {len(row) for row in shown.split("\n")} == {46}
        assert ("any key goes back" in shown) == (number == 3)
        seen += shown
        pages.press("h")
    assert not pages.helping
    assert "…" not in seen
    for word in ("quit", "terminal", "back", "lane", "thread"):
        assert word in seen
