"""The guided tour: its stops, its headline, and the time that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.cells import cell_len

from paged_ref.cli import main
from paged_ref.timeline.events import StepPlanned
from paged_ref.timeline.history import History
from paged_ref.views.viz.tour import SPEED, Tour, headline, stops


def test_it_takes_a_minute_and_goes_through_the_three_managers(runs: list[History]) -> None:
    found = stops(runs)
    assert 50 <= len(found) / SPEED <= 70
    managers = [runs[stop.run].moment(0).state.memory.manager for stop in found]
    assert list(dict.fromkeys(managers)) == ["standard", "swapping", "paged"]
    assert len({(stop.run, stop.position) for stop in found}) == len(found)
    events = [type(runs[stop.run].events[stop.position]).__name__ for stop in found]
    assert {"RegionSwappedOut", "RegionSwappedIn", "SequenceForked", "SwappedOut", "SequenceAdmitted"} <= set(events)


def test_the_headline_counts_steps_and_sequences(runs: list[History]) -> None:
    together = [len(event.chunks) for event in runs[0].events if isinstance(event, StepPlanned)]
    assert headline(runs[:1]) == f"paged {len(together)} steps, {sum(together) / len(together):.1f} sequences together"
    words = headline([runs[1], runs[2], runs[0]])
    steps = [len(run.steps) for run in runs]
    assert steps[0] < steps[2] < steps[1]  # what the tour is about
    assert words.startswith(f"standard {steps[1]} steps, ")
    assert f" · swapping {steps[2]}, " in words
    assert len(words) < 80


def test_each_stop_fills_the_window(runs: list[History]) -> None:
    tour = Tour(runs)
    assert tour.playing
    for position in range(tour.num_positions):
        tour.go(position)
        for size in ((80, 24), (60, 19), (160, 50)):
            rows = tour.draw(*size).plain.split("\n")
            assert (len(rows), {cell_len(row) for row in rows}) == (size[1], {size[0]})
            assert f"stop {position + 1} of {len(tour.stops)}" in rows[-1]
            assert " ".join(" ".join(rows[1:3]).split()) == tour.stops[position].words  # whole, at each width
    assert "at least 60x19 is needed" in " ".join(tour.draw(60, 18).plain.split())
    tour.tick()
    assert not tour.playing  # the last stop ends it
    assert not tour.press("q")


def test_without_a_terminal_the_stops_follow_one_another(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["viz", str(log_file), "--tour", "--size", "80x24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 25 * 12 - 1
    assert main(["viz", str(log_file), "--tour", "--at", "C"]) == 2
    assert "--at cannot be given with --tour" in capsys.readouterr().err
