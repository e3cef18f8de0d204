"""The threads that compute on a CPU: how many, and what they run.

Threads that wait for work actively are a trap. On two busy cores, a step of the embedded model took 55 ms with two BLAS
threads and 2 ms with one: each waited for the other, which had no core. So a step gives BLAS one thread, and what is
large enough is cut in parts here, for Python's own threads, which sleep while they wait. They run side by side where
the work releases the interpreter: NumPy's products and compiled loops (nogil) do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

# A number of threads that the caller names, in one of these variables, is taken; the first one counts.
SETTINGS = ("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")
CGROUP = Path("/sys/fs/cgroup")
SMALL = 1 << 22  # numbers in a matrix of weights: products with it are over before several threads have found together


@cache
def num_threads() -> int:
    """Threads for one piece of work: what the caller names, else a thread for each core that this process may use."""
    named = [int(value) for value in map(os.environ.get, SETTINGS) if value is not None and value.strip().isdigit()]
    return max(1, min([*named[:1], cores()]))


def cores() -> int:
    """The cores that this process may use: its affinity, and the quota of its control group, rounded up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *_quotas()]))


def share_cores(processes: int) -> None:
    """Of a machine on which so many processes compute, take a part: this one, and those that it starts. A number that
    the caller names is kept."""
    if not any(name in os.environ for name in SETTINGS):
        os.environ[SETTINGS[0]] = str(max(1, cores() // processes))


def _quotas() -> list[int]:
    """The quotas of the control group, in cores, as containers see them: version 2's file, and version 1's pair."""
    quotas = []
    for name, period_name in (("cpu.max", ""), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (CGROUP / name).read_text(encoding="ascii").split()
            if period_name:
                words += (CGROUP / period_name).read_text(encoding="ascii").split()
            quota, period = (int(word) for word in words)
        except (OSError, ValueError):  # no such file, or no quota: "max"
            continue
        if quota > 0:  # version 1 says -1 where there is none
            quotas.append(-(-quota // period))
    return quotas


def blas_threads(largest: int = 0) -> AbstractContextManager[object]:
    """Inside, BLAS has one thread if `largest`, the numbers in the largest matrix of weights, is small, and otherwise
    as many as `num_threads` says. For work that is not cut in parts here."""
    blas = _blas()
    return nullcontext() if blas is None else blas.limit(limits=1 if largest <= SMALL else num_threads())


@cache
def _blas() -> Any:
    """What sets BLAS's threads, or None where threadpoolctl is not installed: a machine with a GPU needs it least."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController().select(user_api="blas")


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, num_threads() - 1), thread_name_prefix="part")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork: the child makes its own
    os.register_at_fork(after_in_child=_pool.cache_clear)


def in_threads(function: Callable[..., object], threads: int, *arguments: Any) -> None:
    """Run `function(mine, threads, *arguments)` for each `mine` below `threads`, the first in this thread.
    After Ctrl-C the others still finish: `arguments` or `function` must keep the arrays that they reach by address."""
    others = [_pool().submit(function, mine, threads, *arguments) for mine in range(1, threads)]
    function(0, threads, *arguments)
    for other in others:
        other.result()


def in_parts(function: Callable[..., object], size: int, *arguments: Any) -> None:
    """Run `function(first, end, *arguments)` for parts that cover 0 to `size`: one for each thread. Parts begin at
    multiples of 8."""

    def part(mine: int, threads: int) -> None:
        first, end = (size * number // threads // 8 * 8 for number in (mine, mine + 1))
        function(first, size if mine + 1 == threads else end, *arguments)

    in_threads(part, num_threads())


def in_turns(function: Callable[..., object], size: int, step: int, *arguments: Any) -> None:
    """Run `function(first, end, *arguments)` for parts of `step` that cover 0 to `size`. A thread takes the next part
    when it has done one, so a thread that comes late holds up no other."""
    turns = count(0, step)  # a thread that takes a number is not interrupted

    def part(mine: int, threads: int) -> None:
        while (first := next(turns)) < size:
            function(first, min(size, first + step), *arguments)

    in_threads(part, num_threads())
