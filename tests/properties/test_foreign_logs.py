"""Logs from elsewhere: whatever a line holds, a log is drawn or refused in one sentence; nothing else is raised."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from paged_ref import LLM, SamplingParams
from paged_ref.timeline.events import Event, from_json, to_json
from paged_ref.timeline.history import histories
from paged_ref.views.monitor.report import as_json, as_prometheus
from paged_ref.views.monitor.screen import screen as monitor_screen
from paged_ref.views.monitor.state import Monitor
from paged_ref.views.viz.frames.screen import frames_of, screen
from paged_ref.views.viz.scene import Scene
from paged_ref.views.viz.viz_run import PAPER, record

CASES = 150
NUMBERS = [-1, 0, 1, 2, 5, 7, 100, 10**6, 10**9, 10**18, -(10**18)]
VALUES = [*NUMBERS, "", [], [0], [[0, 1]], "x", None]


@pytest.fixture(scope="module")
def logs() -> list[list[str]]:
    """The lines of four runs: each manager, and pages that stream."""
    streamed: list[Event] = []
    llm = LLM(
        "tiny", device_blocks=6, host_blocks=40, block_size=4, log=streamed.append, backend="reference",
        max_model_len=100, attend=2, max_batch_tokens=16,
    )  # fmt: skip
    llm.engine.kv.watch = (1, 0)  # type: ignore[attr-defined]
    llm.generate(["Once upon a time there was", "The cat"], SamplingParams(max_tokens=12))
    runs = [streamed, record(PAPER, "paged"), record(PAPER, "swapping"), record(PAPER, "standard")]
    return [[to_json(event) for event in events] for events in runs]


def changed(lines: list[str], others: list[str], rng: random.Random) -> list[str]:
    """The log with a line lost, a line of another log in it, or other values in a line."""
    lines, i, how = lines.copy(), rng.randrange(len(lines)), rng.random()
    if how < 0.1:
        return [*lines[:i], *lines[i + 1 :]]
    if how < 0.2:
        return [*lines[:i], rng.choice(others), *lines[i:]]
    event = json.loads(lines[i])
    key = rng.choice(list(event))
    value = event[key]
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        target: Any = value[at] if isinstance(value[at], list) else value
        target[rng.randrange(2) if target is not value else at] = rng.choice(NUMBERS)
    else:
        event[key] = rng.choice(VALUES)
    return [*lines[:i], json.dumps(event), *lines[i + 1 :]]


def show_history(lines: list[str], rng: random.Random) -> None:
    runs = histories(map(from_json, lines))
    for position in {0, len(runs[0]) // 2, rng.randrange(len(runs[0])), len(runs[0]) - 1}:
        scene = Scene(runs[0].moment(position), runs, hints=False)
        for frame in range(len(frames_of(runs[0]))):
            screen(scene, frame, 100, 30)


def show_monitor(lines: list[str], rng: random.Random) -> None:
    monitor = Monitor()
    for event in map(from_json, lines):
        monitor.take(event)
    monitor_screen(monitor, 100, 30)
    json.dumps(as_json(monitor, None))
    as_prometheus(monitor, None)


@pytest.mark.parametrize("show", [show_history, show_monitor])
def test_a_log_with_any_values_is_drawn_or_refused_in_one_sentence(
    logs: list[list[str]], show: Callable[[list[str], random.Random], None]
) -> None:
    rng = random.Random(0)
    refusals: list[str] = []
    for _ in range(CASES):
        lines = changed(rng.choice(logs), rng.choice(logs), rng)
        try:
            show(lines, rng)
        except ValueError as error:
            refusals.append(str(error))
    assert 0.3 * CASES < len(refusals) < CASES
    assert all("\n" not in refusal and len(refusal) < 800 for refusal in refusals)
