"""What the tuned kernels are launched with, on a machine without a GPU: the tracer runs each launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from paged_ref.core.attention.cuda import Launch
from paged_ref.tracer import trace
from paged_ref.tuned import launching
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


def traced(function: Any, *args: Any) -> tuple[Any, trace.Trace]:
    """What a function gives that launches one kernel, and the record of the launch."""
    with launched() as found:
        result = function(*args)
    (only,) = found
    assert only.trace is not None
    return result, only.trace
