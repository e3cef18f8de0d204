"""What the tuned kernels are launched with, on a machine without a GPU: the tracer runs each launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from paged_ref.core.attention.attention import AttentionCall
from paged_ref.core.attention.cuda import Launch
from paged_ref.tracer import trace
from paged_ref.tuned import flash, launching
from paged_ref.tuned.machine_code import Code, bounds_of, compile_kernel, parameters


@dataclass(frozen=True)
class Launched:
    launch: Launch
    trace: trace.Trace | None

    def compiled(self, capability: tuple[int, int]) -> Code:
        return compile_kernel(self.launch.kernel, parameters(self.launch.args), bounds_of(self.launch), capability)


@contextmanager
def launched(run: bool = True) -> Iterator[list[Launched]]:
    """All launches in this block, on NumPy arrays; without `run` they are only noted."""
    found: list[Launched] = []

    def start_of(kernel: Any) -> launching.Start:
        def start(grid: Any, block: Any, args: tuple[Any, ...]) -> None:
            record = trace.run(kernel, grid, block, *args) if run else None
            found.append(Launched(Launch(kernel, grid[:2], block[0], args), record))

        return start

    with launching.on_host(start_of):
        yield found


def flash_launches(call: AttentionCall, num_splits: int = 1) -> list[Launch]:
    """What the tuned attention launches for this call, with each sequence split in so many parts."""
    splits = patch.object(flash, "number_of_splits", lambda *_: num_splits)
    with splits, patch.dict(flash._plans, clear=True), launched(run=False) as found:
        flash.attend(call)
    return [each.launch for each in found]


def traced(function: Any, *args: Any) -> tuple[Any, trace.Trace]:
    """What a function gives that launches one kernel, and the record of the launch."""
    with launched() as found:
        result = function(*args)
    (only,) = found
    assert only.trace is not None
    return result, only.trace
