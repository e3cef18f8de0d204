"""The keys that every view shares."""

from __future__ import annotations

from rich.text import Text

from paged_ref.views.common.viewer import SPEEDS, Viewer, help_lines


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
    assert [row.plain for row in help_lines([("q", "quit"), ("space", "play")])] == [
        " q         quit",
        " space     play",
    ]
