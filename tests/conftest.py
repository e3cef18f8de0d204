"""What tests share: the data beside the project, and what is skipped where something is missing."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest

if TYPE_CHECKING:  # a test that needs none of it should not wait for it
    from paged_ref.timeline.events import Event
    from paged_ref.timeline.history import History

# Packages that every installation for tests has, and a machine with a GPU may lack.
PACKAGES = {"greenlet", "hypothesis", "msgspec", "prometheus_client", "prompt_toolkit", "pyte", "threadpoolctl"}
# A shell that starts the tests in the background makes them ignore Ctrl-C, and all that they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A real checkpoint with its published greedy text; it lies beside the project, not in it."""
    directory = SHARED / "models" / "stories260K"
    if not directory.is_dir():
        pytest.skip("no ../shared/models/stories260K beside the project")
    return directory


@pytest.fixture(scope="session")
def logs() -> dict[str, list[Event]]:
    """The paper's requests, run once under each manager, as `paged-ref viz` runs them."""
    from paged_ref.extras.managers import ManagerName
    from paged_ref.views.viz.viz_run import PAPER, record

    return {name: record(PAPER, name) for name in get_args(ManagerName)}


@pytest.fixture(scope="session")
def log_file(logs: dict[str, list[Event]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three in one file."""
    from paged_ref.timeline.events import write_events

    path = tmp_path_factory.mktemp("viz") / "run.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for events in logs.values():
            write_events(events, file)
    return path


@pytest.fixture
def runs(logs: dict[str, list[Event]]) -> list[History]:
    """The three as timelines."""
    from paged_ref.timeline.history import histories

    return [histories(events)[0] for events in logs.values()]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew, then look at the diff")
    parser.addoption("--lines", type=Path, help="write a line of JSON to this file as each test ends")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """A test file that needs a package of PACKAGES which is not here is skipped, with the reason."""
    report = yield
    missing = re.findall(r"No module named '(\w+)", str(report.longrepr)) if report.failed else []
    if missing and missing[-1] in PACKAGES:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"it needs the package {missing[-1]}")
    return report


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--lines")
    if path is not None and not hasattr(config, "workerinput"):  # one process writes for all
        config.pluginmanager.register(Lines(path))


class Lines:
    """What `make gpu-tests` keeps of a run that is cut short."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = report.longreprtext[-2000:] if report.failed else ""
            line = {
                "test": report.nodeid,
                "outcome": report.outcome,
                "seconds": round(report.duration, 2),
                "text": text,
            }
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where no GPU is in use."""
    from paged_ref.core import device

    if not device.on_gpu:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=device.reason))
