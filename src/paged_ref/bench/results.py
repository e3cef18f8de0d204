"""What benchmarks share: the table of results, and contenders that take turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from ..core.device import synchronize


def table_of(columns: Sequence[str], rows: Iterable[Sequence[str]], **settings: Any) -> Table:
    """A table of numbers; a column without a heading holds names. `settings` are those of rich's Table."""
    table = Table(**{"box": box.SIMPLE_HEAD, **settings})
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    return table


def median_ratio(times: Iterable[float], against: Iterable[float]) -> float:
    """The median ratio of contenders that took turns: a busy neighbour slows both times of a pair alike."""
    return median(x / y for x, y in zip(times, against, strict=True))


class Times(NamedTuple):
    """The shortest times of one contender."""

    seconds: float
    cores: float  # seconds of all cores together, which a busy neighbour hardly changes


def shortest(contenders: Sequence[Callable[[], object]], rounds: int) -> list[Times]:
    """For each contender the shortest times of so many rounds, in which the contenders take turns."""
    for contender in contenders:
        contender()  # warm
    best = [Times(math.inf, math.inf)] * len(contenders)
    for _ in range(rounds):
        for i, contender in enumerate(contenders):
            synchronize()
            began, cores = perf_counter(), process_time()
            contender()
            synchronize()
            best[i] = Times(min(best[i].seconds, perf_counter() - began), min(best[i].cores, process_time() - cores))
    return best
