"""Sizes are held against the memory that there is, before any of it is taken."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path

from ..core.device import on_gpu, xp

# What a container may have, with version 2 and 1 of Linux control groups.
_CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@cache
def machine_memory() -> int:
    """Bytes of this machine's memory, or of the container's."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CONTAINER:
        with suppress(OSError, ValueError):  # no such control group, or "max"
            found.append(int(Path(path).read_text(encoding="ascii")))
    return min(found)


@cache
def gpu_memory() -> int:
    """Bytes of the memory of the GPU in use."""
    return int(xp.cuda.runtime.getDeviceProperties(xp.cuda.runtime.getDevice())["totalGlobalMem"])


def require_memory(what: str, num_bytes: int, *, device: bool = False) -> None:
    """Raise ValueError if `num_bytes` are more than there are; `what` says which argument asks for them.

    `device`: the bytes are the device's, which are this machine's too where no GPU is in use.
    """
    place, there = ("GPU", gpu_memory()) if device and on_gpu else ("machine", machine_memory())
    if num_bytes > there:
        raise ValueError(f"{what} needs {num_bytes / 1e9:,.1f} GB; this {place} has {there / 1e9:,.1f} GB")
