"""What the tests of the screen share: the paper's requests under each manager, run once."""

from __future__ import annotations

from pathlib import Path

import pytest

from paged_ref.memory.events import Event, write_events
from paged_ref.memory.factory import ManagerName
from paged_ref.terminal.history import History, histories
from paged_ref.terminal.viz_run import PAPER, record

NAMES: tuple[ManagerName, ...] = ("paged", "standard", "swapping")


@pytest.fixture(scope="session")
def logs() -> dict[str, list[Event]]:
    return {name: record(PAPER, name) for name in NAMES}


@pytest.fixture(scope="session")
def log_file(logs: dict[str, list[Event]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("viz") / "run.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for name in NAMES:
            write_events(logs[name], file)
    return path


@pytest.fixture
def runs(logs: dict[str, list[Event]]) -> list[History]:
    return [histories(logs[name])[0] for name in NAMES]
