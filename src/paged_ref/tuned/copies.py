"""Page-locked host memory, and copies between device and host that run beside the computation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from ..core.device import Array, module_of, on_gpu, xp
from ..core.memory.manager import Transfer
from .flat_views import address_of

MAX_PITCH = 2**31 - 1  # bytes from row to row that cudaMemcpy2D takes (cudaDeviceProp::memPitch)


class CopyStream:
    """On a GPU, a stream of its own for copies from and to page-locked memory. On a CPU, plain copies.

    Order: a copy sees all that was computed before `begin`, and what is computed after `wait` sees all copies. The
    host waits only in `synchronize`.
    """

    def __init__(self) -> None:
        self._stream: Any = xp.cuda.Stream(non_blocking=True) if on_gpu else None

    def begin(self, after: Any = None) -> None:
        """Copies from now on wait for the event `after`; by default, for everything computed so far."""
        if self._stream is not None:
            self._stream.wait_event(self.computed() if after is None else after)

    def wait(self, until: Any = None) -> None:
        """What is computed from now on waits for the event `until`; by default, for all copies so far."""
        if self._stream is not None:
            xp.cuda.get_current_stream().wait_event(self.copied() if until is None else until)

    def computed(self) -> Any:
        """An event for `begin`: everything computed so far. None on a CPU."""
        return None if self._stream is None else xp.cuda.get_current_stream().record(_event())

    def copied(self) -> Any:
        """An event for `wait`: all copies so far. None on a CPU."""
        return None if self._stream is None else self._stream.record(_event())

    def synchronize(self) -> None:
        """Make the host wait for all copies. Call before reading host memory that `out` wrote."""
        if self._stream is not None:
            self._stream.synchronize()

    def out(self, device: Array, host: np.ndarray) -> None:
        """Copy `device` to `host`: contiguous arrays of one shape."""
        if self._stream is None:
            np.copyto(host, device)
        else:
            device.get(stream=self._stream, out=host, blocking=False)

    def back(self, host: np.ndarray, device: Array) -> None:
        """Copy `host` to `device`: contiguous arrays of one shape."""
        if self._stream is None:
            np.copyto(device, host)
        else:
            device.set(host, stream=self._stream)

    def swap(self, transfers: Iterable[Transfer], device: Array, host: np.ndarray) -> None:
        """Begin to make these swaps of blocks, `device, host [num_planes, num_blocks, ...]`, in their order."""
        self.begin()
        for transfer in transfers:
            source = slice(transfer.source, transfer.source + transfer.count)
            destination = slice(transfer.destination, transfer.destination + transfer.count)
            if transfer.kind == "swap_out":
                self.out_planes(device[:, source], host[:, destination])
            else:
                self.back_planes(host[:, source], device[:, destination])

    def out_planes(self, device: Array, host: np.ndarray) -> None:
        """Copy `device` to `host`, [num_planes, ...] each: every plane is contiguous, and planes may lie apart."""
        if self._stream is None:
            np.copyto(host, device)
        else:
            self._copy_planes(device, host, xp.cuda.runtime.memcpyDeviceToHost)

    def back_planes(self, host: np.ndarray, device: Array) -> None:
        """Copy `host` to `device`, as `out_planes` does the other way."""
        if self._stream is None:
            np.copyto(device, host)
        else:
            self._copy_planes(host, device, xp.cuda.runtime.memcpyHostToDevice)

    def _copy_planes(self, source: Array, target: Array, direction: int) -> None:
        """One copy for all planes, unless the distance between planes is too large for that: then one for each."""
        pitch, target_pitch, width = source.strides[0], target.strides[0], source[0].nbytes
        at, to, runtime = address_of(source), address_of(target), xp.cuda.runtime
        if max(pitch, target_pitch) <= MAX_PITCH:
            runtime.memcpy2DAsync(to, target_pitch, at, pitch, width, len(source), direction, self._stream.ptr)
            return
        for plane in range(len(source)):  # a pitch beyond the limit is refused even for a single row
            runtime.memcpyAsync(to + plane * target_pitch, at + plane * pitch, width, direction, self._stream.ptr)

    def gather(self, host: np.ndarray, rows: np.ndarray, device: Array) -> None:
        """Copy `host[rows]` to the leading rows of `device`."""
        if module_of(device) is np:
            np.take(host, rows, axis=0, out=device[: len(rows)], mode="clip")
            return
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1).tolist()  # one copy for each run of rows
        for begin, end in pairwise([*starts, len(rows)]):
            first = int(rows[begin])
            self.back(host[first : first + end - begin], device[begin:end])


def pinned(shape: tuple[int, ...], dtype: str, fill: float = np.nan) -> np.ndarray:
    """Host memory full of `fill`; page-locked where a GPU is, so that copies are fast."""
    if not on_gpu:
        return np.full(shape, fill, dtype=dtype)
    host = exactly_pinned(shape, np.dtype(dtype))
    host.fill(fill)
    return host


def exactly_pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Page-locked memory on a machine with a GPU, of this size to the byte, given back with its last array. (CuPy's own
    pool rounds up to a power of two, so that 70 GB would ask for 128 GiB, and gives nothing back.)"""
    memory = xp.cuda.PinnedMemoryPointer(xp.cuda.PinnedMemory(max(1, math.prod(shape) * dtype.itemsize)), 0)
    return np.ndarray(shape, dtype, memory)


def _event() -> Any:
    return xp.cuda.Event(disable_timing=True)
