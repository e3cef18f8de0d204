"""A group whose ranks are processes that MPI connects, on one machine or several.

MPI waits actively: a rank that waits takes a core from one that computes, and where a process is killed, the others
wait for ever. So a rank here asks MPI whether a message has come, and sleeps in between, a little longer each time, on
a socket to rank 0. The system closes the sockets of a process that ends, which wakes the other end.

A GPU's arrays are staged through host memory. NCCL, which sends from GPU to GPU, is not used: it could not be tried.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from ..core.device import on_gpu, xp
from ..tuned.threads import share_cores
from .group import Group, GroupClosed, GroupError

SPINS = 200  # questions before the first sleep; between them, another process may have the core
SHORTEST, LONGEST = 2e-5, 1e-3  # seconds of one sleep
CLOSED = b"\0"


class MPIGroup(Group):
    """This process's place in MPI.COMM_WORLD. Each rank of a machine takes a GPU of its own, as far as they go, or its
    share of the cores."""

    def __init__(self) -> None:
        super().__init__()
        self._comm = MPI.COMM_WORLD
        self.rank, self.size = self._comm.rank, self._comm.size
        here = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        if on_gpu:
            xp.cuda.Device(here.rank % xp.cuda.runtime.getDeviceCount()).use()
        else:
            share_cores(here.size)
        self._lines: dict[socket.socket, int] = {}  # to rank 0; on rank 0, to each other rank
        self._connect("127.0.0.1" if here.size == self.size else socket.gethostname())

    def _connect(self, host: str) -> None:
        if self.rank == 0:
            with socket.create_server(("127.0.0.1" if host == "127.0.0.1" else "", 0)) as server:
                self._comm.bcast((host, server.getsockname()[1]))
                while len(self._lines) < self.size - 1:
                    line, _ = server.accept()
                    self._lines[line] = line.recv(1)[0]
        else:
            line = socket.create_connection(self._comm.bcast(None))
            line.sendall(bytes([self.rank]))
            self._lines[line] = 0

    def _send(self, rank: int, buffer: np.ndarray) -> None:
        self._wait(self._comm.Isend([buffer, MPI.BYTE], dest=rank).Test)

    def take(self, rank: int, dtype: type) -> np.ndarray:
        status = MPI.Status()
        self._wait(lambda: self._comm.Iprobe(source=rank, status=status))
        buffer = np.empty(status.Get_count(MPI.BYTE), dtype=np.uint8)
        self._wait(self._comm.Irecv([buffer, MPI.BYTE], source=rank).Test)
        return buffer.view(dtype)

    def _sum(self, part: np.ndarray) -> np.ndarray:
        total = np.empty_like(part)
        self._wait(self._comm.Iallreduce(part, total).Test)
        return total

    def _wait(self, done: Callable[[], bool]) -> None:
        """Until `done()`. Raises GroupError where a rank is gone, and GroupClosed."""
        began, tries, pause = time.perf_counter(), 0, SHORTEST
        while not done():
            tries += 1
            if tries < SPINS:
                time.sleep(0)
            else:
                self._listen(pause)
                pause = min(2 * pause, LONGEST)
        self.seconds += time.perf_counter() - began

    def _listen(self, seconds: float) -> None:
        """Sleep for so long, or until a rank is gone or rank 0 says that it is over."""
        for line in select.select(list(self._lines), [], [], seconds)[0]:
            if self.rank == 0:
                reason = f"rank {self._lines[line]} has ended in the middle of the run"
            elif (said := line.recv(4096)) == CLOSED:
                raise GroupClosed
            else:
                reason = said.decode() or "rank 0 has ended in the middle of the run"
            raise GroupError(reason)

    def close(self, reason: str = "") -> None:
        for line in self._lines:
            with contextlib.suppress(OSError):  # the rank at the other end is gone
                line.sendall(reason.encode() or CLOSED)
