"""What benchmarks share: tables and files of results, and contenders that take turns."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from ..core.device import on_gpu, synchronize, xp
from ..views.common.files import write_json
from ..views.common.versions import describe_device, versions
from . import conditions


def table_of(columns: Sequence[str], rows: Iterable[Sequence[str]], **settings: Any) -> Table:
    """A table of numbers; a column without a heading holds names. `settings` are those of rich's Table."""
    table = Table(**{"box": box.SIMPLE_HEAD, **settings})
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    return table


def write_results(path: Path | None, **results: Any) -> None:
    """Write the results as JSON, after what they were measured on. Without a path nothing is written."""
    if path is None:
        return
    header = {
        "device": describe_device(),
        **conditions.describe_cpu(),
        "spread_of_rounds": conditions.spread(),
        "driver_cuda_version": xp.cuda.runtime.driverGetVersion() if on_gpu else None,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions(),
    }
    write_json(path, header | results)


def median_ratio(times: Iterable[float], against: Iterable[float]) -> float:
    """The median ratio of contenders that took turns: a busy neighbour slows both times of a pair alike."""
    return median(x / y for x, y in zip(times, against, strict=True))


class Times(NamedTuple):
    """How long a contender took."""

    seconds: float
    cores: float  # seconds of all cores together, which a busy neighbour hardly changes


def take_turns(
    contenders: Iterable[Callable[[], object]], rounds: int, warm_up: float = 0.0
) -> list[tuple[Times, ...]]:
    """For each contender the times of so many rounds, in which the contenders take turns.

    A contender runs for `warm_up` seconds before its time is taken: cores and caches are then its own.
    """
    times = [[timed(contender, warm_up) for contender in contenders] for _ in range(rounds)]
    turns = list(zip(*times, strict=True))
    for turn in turns:
        conditions.record_rounds([each.seconds for each in turn])
    return turns


def shortest(contenders: Sequence[Callable[[], object]], rounds: int) -> list[Times]:
    """For each contender the shortest times of so many rounds, after one call that is not timed."""
    for contender in contenders:
        contender()
    return [Times(*map(min, zip(*times, strict=True))) for times in take_turns(contenders, rounds)]


def timed(run: Callable[[], object], warm_up: float = 0.0) -> Times:
    """How long one call takes, until the device has done its work, after `warm_up` seconds of the same calls."""
    warm = perf_counter() + warm_up
    while perf_counter() < warm:
        run()
    synchronize()
    began, cores = perf_counter(), process_time()
    run()
    synchronize()
    return Times(perf_counter() - began, process_time() - cores)
