"""A group whose ranks are threads of this process: several workers on any machine, for lessons and tests.

What the ranks say and compute is the code of distributed/, and so the same as with MPI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from ..distributed.group import Group, GroupClosed, GroupError
from ..distributed.plan import follow
from ..llm import LLM

Lines = list[list[SimpleQueue[Any]]]  # [from][to]


class ThreadGroup(Group):
    """One rank. A rank that waits sleeps."""

    def __init__(self, rank: int, lines: Lines) -> None:
        super().__init__()
        self.rank, self.size, self.lines = rank, len(lines), lines

    def _send(self, rank: int, buffer: np.ndarray) -> None:
        self.lines[self.rank][rank].put(buffer.copy())

    def take(self, rank: int, dtype: type) -> np.ndarray:
        buffer = self.lines[rank][self.rank].get()
        if isinstance(buffer, BaseException):
            raise buffer
        return np.asarray(buffer, dtype=dtype).ravel()

    def _sum(self, part: np.ndarray) -> np.ndarray:
        others = [rank for rank in range(self.size) if rank != self.rank]
        for rank in others:
            self._send(rank, part)
        parts = {self.rank: part} | {rank: self.take(rank, np.float32).reshape(part.shape) for rank in others}
        return np.asarray(sum(parts[rank] for rank in range(self.size)))

    def close(self, reason: str = "") -> None:
        for rank in range(self.size):
            if rank != self.rank:
                self.lines[self.rank][rank].put(GroupError(reason) if reason else GroupClosed())


@contextmanager
def threads(size: int, make: Callable[[Group], LLM]) -> Iterator[list[LLM]]:
    """The LLMs of `size` ranks, each made by `make(group)`. Rank 0's is the first, and to be used; the others follow it
    until the block ends."""
    lines: Lines = [[SimpleQueue() for _ in range(size)] for _ in range(size)]
    groups = [ThreadGroup(rank, lines) for rank in range(size)]
    llms = [make(group) for group in groups]

    def run(rank: int) -> None:
        try:
            follow(llms[rank].engine, groups[rank])
        except BaseException as error:
            groups[rank].close(f"rank {rank} has failed: {error!r}")

    workers = [Thread(target=run, args=(rank,), daemon=True, name=f"rank {rank}") for rank in range(1, size)]
    for worker in workers:
        worker.start()
    try:
        yield llms
    finally:
        groups[0].close()
        for worker in workers:
            worker.join()
