"""The player's keys, without a terminal."""

from __future__ import annotations

import pytest

from paged_ref.timeline.events import SequenceForked, StepPlanned, sequences_of
from paged_ref.timeline.history import History
from paged_ref.views.common.viewer import SPEEDS
from paged_ref.views.viz.frames.screen import FRAMES
from paged_ref.views.viz.player import Player


@pytest.fixture
def player(runs: list[History]) -> Player:
    return Player(runs)


def press(player: Player, *keys: str) -> None:
    for key in keys:
        assert player.press(key)


def shown(player: Player) -> str:
    return player.draw(80, 24).plain


def test_forward_and_back_to_the_start_is_the_start(player: Player) -> None:
    seen = [shown(player)]
    for _ in range(80):
        press(player, "right")
        seen.append(shown(player))
    assert len(set(seen)) == len(seen)
    while len(seen) > 1:
        assert shown(player) == seen.pop()
        press(player, "left")
    assert (shown(player), player.position) == (seen[0], 0)
    press(player, "left")
    assert shown(player) == seen[0]


def test_steps_ends_and_runs(player: Player) -> None:
    press(player, "down")
    assert isinstance(player.moment().event, StepPlanned)
    press(player, "down", "down", "up")
    assert player.moment().step == 1
    press(player, "tab")
    assert (player.run, player.moment().step) == (1, 1)
    press(player, "shift tab", "shift tab")
    assert player.run == 2
    press(player, "end")
    assert player.position == len(player.history) - 1
    press(player, "down", "right")
    assert player.position == len(player.history) - 1
    press(player, "home", "up")
    assert player.position == 0


def test_next_of_what_a_frame_is_about(player: Player) -> None:
    press(player, "2", "n")
    assert isinstance(player.moment().event, SequenceForked)
    press(player, "n", "p")
    assert isinstance(player.moment().event, SequenceForked)
    press(player, "p")
    assert "nothing earlier" in shown(player)
    press(player, "right")
    assert "nothing earlier" not in shown(player)


def test_frames(player: Player) -> None:
    for i, frame in enumerate(FRAMES, start=1):
        press(player, str(i))
        assert f"[{i} {frame.name}]" in shown(player)
    press(player, "9")
    assert "no such key" in shown(player)


def test_find(player: Player) -> None:
    press(player, "/", "b", "3", "backspace", "2", "enter")
    assert player.selected == 2
    assert 2 in sequences_of(player.moment().event)
    first = player.position
    press(player, "/", "enter")  # again: the one after
    assert player.position > first
    assert "▶B2" in shown(player)
    press(player, "/", "n", "o", "enter")
    assert "no sequence 'no' in this run; there are A, B1" in shown(player)
    assert player.selected == 2
    press(player, "/", "q")
    assert "find a sequence: q" in shown(player)
    press(player, "escape", "escape")
    assert player.selected is None


def test_playing(player: Player) -> None:
    press(player, " ")
    player.tick()
    player.tick()
    assert player.position == 2
    press(player, " ")
    player.tick()
    assert player.position == 2
    press(player, "end", " ")  # at the end, it begins again
    assert (player.position, player.playing) == (0, True)
    press(player, "end")
    player.tick()
    assert not player.playing
    for key, speed in (("+", SPEEDS[-1]), ("-", SPEEDS[0])):
        press(player, *[key] * len(SPEEDS))
        assert SPEEDS[player.speed] == speed


def test_help_and_quit(player: Player) -> None:
    press(player, "?")
    assert "one event back, forward" in shown(player)
    assert len(shown(player).split("\n")) == 24
    press(player, "?")
    assert "C copy on write" in shown(player)
    assert "more lines" not in shown(player)
    press(player, "?", "?")
    assert player.press("q")  # any key leaves the help
    assert not player.press("q")


def test_scrolling_shows_other_blocks(player: Player) -> None:
    press(player, "end")
    before = player.draw(70, 17).plain
    press(player, "pgdn")
    assert player.draw(70, 17).plain != before
    press(player, "pgup")
    assert player.draw(70, 17).plain == before
