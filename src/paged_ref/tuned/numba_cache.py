"""Where compiled code is kept: beside the source or in the user's cache, else in the temporary directory.

Numba refuses to declare a function that is to be kept, but has no place: a package that is installed read-only, for a
user without a home, as in a container. Importing this file imports no Numba.
"""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any
from unittest.mock import patch

HERE = os.path.dirname(__file__)


@contextmanager
def anywhere() -> Iterator[None]:
    """In this block `njit(cache=True)` declares a function on every machine; without any place nothing is kept."""
    from numba import config
    from numba.core.dispatcher import Dispatcher

    keep = Dispatcher.enable_caching

    def keep_somewhere(function: Any) -> None:
        try:
            if _is_homeless():
                raise RuntimeError
            keep(function)
        except RuntimeError:
            place = temporary()
            _say_once(place)
            if place is not None:
                config.CACHE_DIR, before = place, config.CACHE_DIR
                try:
                    keep(function)
                finally:
                    config.CACHE_DIR = before

    with patch.object(Dispatcher, "enable_caching", keep_somewhere):
        yield


@cache
def folder() -> str | None:
    """The first of Numba's places that takes a file, for code of the package's own; None where there is none."""
    named, home = os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    beside = os.path.join(HERE, "__pycache__")
    for place in [named] if named else [beside, *([] if _is_homeless() else [os.path.join(home, "paged_ref")])]:
        with suppress(OSError):
            os.makedirs(place, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
            return place
    _say_once(temporary())
    return temporary()


def only_mine(found: os.stat_result) -> bool:
    """Whether this user alone may write it. Code from anything else is not run."""
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)


def _is_homeless() -> bool:
    """A user whose home nothing names: Numba would make a folder `~` where the program was started."""
    variables = ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")
    named = os.path.expanduser("~") != "~" or any(variable in os.environ for variable in variables)
    return not named and not os.access(HERE, os.W_OK)


def temporary() -> str | None:
    """A folder in the temporary directory that this user alone may write: what is in it is loaded and run."""
    try:
        place = os.path.join(tempfile.gettempdir(), f"paged_ref-{os.getuid()}")
        os.makedirs(place, mode=0o700, exist_ok=True)
        found = os.lstat(place)
        tempfile.TemporaryFile(dir=place).close()
    except OSError:
        return None
    return place if stat.S_ISDIR(found.st_mode) and only_mine(found) else None


@cache
def _say_once(place: str | None) -> None:
    where = "are compiled again in each run" if place is None else f"are kept in {place}"
    warnings.warn(f"Numba has no place to keep compiled functions beside the package or at home; they {where}",
                  RuntimeWarning, stacklevel=2)  # fmt: skip
