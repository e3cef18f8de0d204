"""What happened in a run: events, the state after each of them, and any moment of the run."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import events as events
    from . import logged as logged


def __getattr__(name: str) -> ModuleType:
    """`timeline.events` and `timeline.logged` are imported when they are first asked for: they need msgspec, which a
    machine with a GPU may lack, and only a run with a log needs them."""
    if name not in ("events", "logged"):
        raise AttributeError(name)
    return import_module(f"{__name__}.{name}")
