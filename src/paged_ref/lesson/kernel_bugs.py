"""Bugs for the teaching kernels. Here, and in no lesson, stands which line of a kernel a bug changes.

Each bug names one place. A test holds that the place is in its kernels exactly once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

KERNEL_BUGS = {  # what the bug is -> source text, and what stands there with the bug
    "no barrier after the largest score is read": (
        "cuda.syncthreads()  # All have read work[0].",
        "pass  # All have read work[0].",
    ),
    "the first sequence's block table for all": ("block_tables[seq]", "block_tables[0]"),
}


def plant(kernel: Any, bug: str) -> Callable[..., None]:
    """A copy of `kernel`, a function made by `cuda.jit`, with one of KERNEL_BUGS. It runs in the tracer.

    Raises ValueError for an unknown bug, and for a kernel in which the bug's place is not exactly once.
    """
    if bug not in KERNEL_BUGS:
        raise ValueError(f"the bug is {bug!r}; known are {', '.join(map(repr, KERNEL_BUGS))}")
    function = kernel.py_func
    source = inspect.getsource(function)
    for fragment, replacement in (("@cuda.jit\n", ""), KERNEL_BUGS[bug]):
        if (count := source.count(fragment)) != 1:
            raise ValueError(f"{fragment!r} is {count} times in {function.__module__}.{function.__name__}, not once")
        source = source.replace(fragment, replacement)
    namespace = dict(function.__globals__)
    exec(source, namespace)
    broken: Callable[..., None] = namespace[function.__name__]
    return broken
