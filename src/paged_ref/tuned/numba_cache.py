"""Where Numba keeps what it compiled: beside the source or in the user's cache, else in the temporary directory.

Numba refuses to declare a function that is to be kept, but has no place: a package that is installed read-only, for a
user without a home, as in a container.
"""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

from numba import config
from numba.core.dispatcher import Dispatcher


@contextmanager
def anywhere() -> Iterator[None]:
    """In this block `njit(cache=True)` declares a function on every machine; without any place nothing is kept."""
    keep = Dispatcher.enable_caching

    def keep_somewhere(function: Any) -> None:
        try:
            if _is_homeless():
                raise RuntimeError
            keep(function)
        except RuntimeError:
            folder = _temporary()
            _say_once(folder)
            if folder is not None:
                config.CACHE_DIR, before = folder, config.CACHE_DIR
                try:
                    keep(function)
                finally:
                    config.CACHE_DIR = before

    with patch.object(Dispatcher, "enable_caching", keep_somewhere):
        yield


def _is_homeless() -> bool:
    """A user whose home nothing names: Numba would make a folder `~` where the program was started."""
    named = os.path.expanduser("~") != "~" or "XDG_CACHE_HOME" in os.environ or config.CACHE_DIR
    return not named and not os.access(os.path.dirname(__file__), os.W_OK)


def _temporary() -> str | None:
    """A folder in the temporary directory that this user alone may write: what is in it is loaded and run."""
    try:
        folder = os.path.join(tempfile.gettempdir(), f"paged_ref-{os.getuid()}")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        found = os.lstat(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return None
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if mine else None


@cache
def _say_once(folder: str | None) -> None:
    where = "are compiled again in each run" if folder is None else f"are kept in {folder}"
    warnings.warn(f"Numba has no place to keep compiled functions beside the package or at home; they {where}",
                  RuntimeWarning, stacklevel=2)  # fmt: skip
