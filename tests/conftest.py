"""What tests share: the data beside the project, and what is skipped where something is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A real checkpoint with its published greedy text; it lies beside the project, not in it."""
    directory = SHARED / "models" / "stories260K"
    if not directory.is_dir():
        pytest.skip("no ../shared/models/stories260K beside the project")
    return directory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew, then look at the diff")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where no GPU is in use."""
    from paged_ref import device

    if not device.on_gpu:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=device.reason))
