"""The memory that a traced kernel sees: arrays that check and record each access.

An access outside an array stops the kernel; NumPy would count a negative index from the end, and a GPU would read or
write whatever lies there. Shared and local arrays also have a guard: memory that was not written holds garbage, and
another thread may read what a thread wrote to shared memory only after a barrier.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np

from ..core.checks import plural
from .access_record import WARP_SIZE, ArrayInfo


class Fault(Exception):  # noqa: N818
    """A mistake of a kernel, in words. The tracer adds the place, and raises KernelError."""


class Machine(Protocol):
    """What arrays ask of the machine that runs the kernel."""

    thread: int  # number of the thread that runs now
    clock: int  # rises at each barrier and warp barrier
    barrier_clock: int  # when the CUDA block's last barrier was
    warp_clock: list[int]  # when each warp's last barrier was
    log: Any  # flat sequence of (site, thread, array number, flat index, write)

    def site_of(self, frame: Any) -> int: ...
    def thread_name(self, thread: int) -> str: ...


class LocalGuard:
    """An array of one thread: an element must be written before it is read."""

    def __init__(self, size: int) -> None:
        self.written = bytearray(size)

    def read(self, flat: int) -> None:
        if not self.written[flat]:
            raise Fault("which the thread has not written")

    def write(self, flat: int) -> None:
        self.written[flat] = 1

    update = write


# In the place of a thread's number. As readers, several threads of warp w are _ONE_WARP - w.
_NEVER, _ATOMIC, _SEVERAL, _ONE_WARP = -1, -2, -2, -3


class SharedGuard:
    """An array of one CUDA block: between two threads that touch an element, one of them writing, a barrier must stand.

    A warp barrier orders the threads of its warp (all of them, whatever its mask). A shuffle orders none.
    """

    def __init__(self, size: int, machine: Machine) -> None:
        self.machine = machine
        self.writer = [_NEVER] * size  # of each element, the last one
        self.write_time = [-1] * size
        self.reader = [_NEVER] * size  # of each element, since the last barrier that orders them
        self.read_time = [-1] * size

    def read(self, flat: int) -> None:
        thread = self.machine.thread
        self._check_writer(flat, (thread,), must_exist=True)
        reader, warp = self._unordered_reader(flat), thread // WARP_SIZE
        if reader in (_NEVER, thread):
            self.reader[flat] = thread
        elif reader == _ONE_WARP - warp or (reader >= 0 and reader // WARP_SIZE == warp):
            self.reader[flat] = _ONE_WARP - warp
        else:
            self.reader[flat] = _SEVERAL
        self.read_time[flat] = self.machine.clock

    def write(self, flat: int) -> None:
        thread = self.machine.thread
        self._check_writer(flat, (thread,))
        self._check_reader(flat)
        self.writer[flat], self.write_time[flat] = thread, self.machine.clock

    def update(self, flat: int) -> None:
        """An atomic reads and writes in one step; atomics need no barrier between each other."""
        self._check_writer(flat, (self.machine.thread, _ATOMIC), must_exist=True)
        self._check_reader(flat)
        self.writer[flat], self.write_time[flat] = _ATOMIC, self.machine.clock

    def _check_writer(self, flat: int, allowed: tuple[int, ...], must_exist: bool = False) -> None:
        writer = self.writer[flat]
        if writer in allowed:
            return
        if writer == _NEVER:
            if must_exist:
                raise Fault("which no thread has written")
        elif not self._ordered(writer // WARP_SIZE, self.write_time[flat]):
            name = "an atomic" if writer == _ATOMIC else self.machine.thread_name(writer)
            raise Fault(f"which {name} wrote, with no barrier between: a race")

    def _check_reader(self, flat: int) -> None:
        reader = self._unordered_reader(flat)
        if reader not in (_NEVER, self.machine.thread):
            name = self.machine.thread_name(reader) if reader >= 0 else "several other threads"
            raise Fault(f"which {name} read, with no barrier between: a race")

    def _unordered_reader(self, flat: int) -> int:
        reader = self.reader[flat]
        warp = reader // WARP_SIZE if reader >= 0 else _ONE_WARP - reader
        return _NEVER if self._ordered(warp, self.read_time[flat]) else reader

    def _ordered(self, warp: int, when: int) -> bool:
        """True where a barrier stands between an access of `warp` at `when` and the running thread."""
        machine = self.machine
        if when < machine.barrier_clock:
            return True
        return warp == machine.thread // WARP_SIZE and when < machine.warp_clock[warp]


class TracedArray:
    """A NumPy array, or a view of one, that a kernel reads and writes one element at a time."""

    __slots__ = ("data", "dtype", "first", "guard", "info", "machine", "ndim", "number", "shape", "size", "steps")

    def __init__(
        self, machine: Machine, number: int, info: ArrayInfo, data: Any, guard: LocalGuard | SharedGuard | None
    ) -> None:
        self.machine, self.number, self.info, self.guard = machine, number, info, guard
        steps = [1] * data.ndim  # elements from one index to the next, row-major
        for axis in range(data.ndim - 1, 0, -1):
            steps[axis - 1] = steps[axis] * data.shape[axis]
        self._show(data, 0, tuple(steps))

    def _show(self, data: Any, first: int, steps: tuple[int, ...]) -> None:
        self.data, self.first, self.steps = data, first, steps
        self.shape, self.ndim, self.dtype, self.size = data.shape, data.ndim, data.dtype, data.size

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.data.strides)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int and self.ndim == 1 and 0 <= index < self.size:  # the common case, made fast
            flat = self.first + index * self.steps[0]
        else:
            if type(index) is not tuple:
                index = (index,)
            if len(index) != self.ndim or slice in map(type, index):
                return self._view(index)
            flat = self._flat(index)
        machine, guard = self.machine, self.guard
        machine.log.extend((machine.site_of(sys._getframe(1)), machine.thread, self.number, flat, 0))
        if guard is not None and not (type(guard) is LocalGuard and guard.written[flat]):
            self._ask(guard.read, "reads", flat)
        value = self.data[index]
        return int(value) if self.dtype.kind in "iu" else value  # integers are 64 bits wide in a kernel

    def __setitem__(self, index: Any, value: Any) -> None:
        if type(index) is int and self.ndim == 1 and 0 <= index < self.size:
            flat = self.first + index * self.steps[0]
        else:
            index = index if type(index) is tuple else (index,)
            flat = self._flat(index)
        machine, guard = self.machine, self.guard
        machine.log.extend((machine.site_of(sys._getframe(1)), machine.thread, self.number, flat, 1))
        if guard is not None:
            self._ask(guard.write, "writes", flat)
        self.data[index] = value

    def update(self, index: Any, compute: Any, frame: Any) -> Any:
        """An atomic: put `compute(old)` in the place of `old` in one step, and return `old`."""
        index = index if type(index) is tuple else (index,)
        flat, machine = self._flat(index), self.machine
        for write in (0, 1):
            machine.log.extend((machine.site_of(frame), machine.thread, self.number, flat, write))
        if self.guard is not None:
            self._ask(self.guard.update, "updates", flat)
        old = self.data[index]
        self.data[index] = compute(old)
        return int(old) if self.dtype.kind in "iu" else old

    def _flat(self, index: tuple[Any, ...]) -> int:
        """The element's place in the whole array, row-major."""
        if len(index) != self.ndim:
            raise Fault(f"{self.info.name} has {plural(self.ndim, 'dimension')}; {len(index)} given")
        flat = self.first
        for i, bound, step in zip(index, self.shape, self.steps, strict=False):
            if not 0 <= i < bound:
                place = ", ".join(map(str, index))
                raise Fault(f"{self.info.name}[{place}] is outside the shape {list(self.shape)}")
            flat += i * step
        return int(flat)

    def _view(self, index: tuple[Any, ...]) -> TracedArray:
        """A row or a slice: no access, and the record keeps the whole array's name and indices."""
        if len(index) > self.ndim:
            raise Fault(f"{self.info.name} has {plural(self.ndim, 'dimension')}; {len(index)} given")
        first, steps = self.first, []
        for i, bound, step in zip(index, self.shape, self.steps, strict=False):
            if isinstance(i, slice):
                start, _, stride = i.indices(bound)
                first += start * step
                steps.append(step * stride)
            elif 0 <= i < bound:
                first += int(i) * step
            else:
                raise Fault(f"index {i} of {self.info.name} is outside the shape {list(self.shape)}")
        view = TracedArray.__new__(TracedArray)
        view.machine, view.number, view.info, view.guard = self.machine, self.number, self.info, self.guard
        view._show(self.data[index], first, (*steps, *self.steps[len(index) :]))
        return view

    def _ask(self, check: Any, verb: str, flat: int) -> None:
        try:
            check(flat)
        except Fault as fault:
            place = ", ".join(str(i) for i in np.unravel_index(flat, self.info.shape))
            raise Fault(f"{verb} {self.info.space} {self.info.name}[{place}], {fault}") from None
