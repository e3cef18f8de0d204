"""Backend `trace`: runs any CUDA kernel on the CPU, unchanged, and records every read and write.

The kernel's Python function is built again with other globals: `cuda` is a stand-in, and the arguments are
recording arrays. Each CUDA thread is a greenlet. It runs until its next barrier, shuffle or end, then the next
thread runs; when all have arrived, the round after the barrier begins. So a run is deterministic, and a barrier that
some threads never reach is found immediately. CUDA blocks run one after another.

Arithmetic is the device's: float32 stays float32, integers are wide. Two things differ in the last bit: a
GPU fuses `a * b + c` into one rounding, and its exp and log are approximations.
"""

from __future__ import annotations

import contextvars
import importlib.util
import math
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from linecache import getline
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..core.attention import cuda as launcher
from ..core.attention.attention import AttentionCall
from ..core.checks import plural
from ..core.device import module_of
from .access_record import WARP_SIZE, Access, ArrayInfo, Dim3, Trace, WarpAccess
from .sites import Sites
from .traced_cuda import Cuda, Integer, Rebuilder, WaitPoint
from .traced_memory import Fault, LocalGuard, SharedGuard, TracedArray

__all__ = ["Access", "KernelError", "Trace", "WarpAccess", "recording", "run"]

Size = int | tuple[int, ...]


class KernelError(Exception):
    """A mistake of a kernel. The message says what it is, in which thread, and at which line."""

    def __init__(self, what: str, kernel: str, block: Dim3, thread: Dim3, file: str, line: int) -> None:
        self.what, self.kernel, self.block, self.thread, self.line = what, kernel, block, thread, line
        super().__init__(
            f"{kernel}, block {tuple(block)}, thread {tuple(thread)}, {Path(file).name}:{line}: {what}\n"
            f"    {getline(file, line).strip()}"
        )


def run(kernel: Any, grid: Size, block: Size, *args: Any) -> Trace:
    """Run `kernel[grid, block](*args)` on NumPy arrays, and return the record of its accesses.

    `kernel` is what `cuda.jit` made, or its Python function; `grid` and `block` are an int or a tuple of up
    to three. Arrays are changed in place. Raises KernelError.
    """
    return _Machine(getattr(kernel, "py_func", kernel), _dim3(grid), _dim3(block), args).run()


def unavailable() -> str | None:
    """Why this backend cannot run on this machine; None where it can."""
    if importlib.util.find_spec("greenlet") is None:
        return "it needs the package greenlet"
    return None


def unsupported(call: AttentionCall) -> str | None:
    """Why this backend cannot run this call; None where it can."""
    if module_of(call.query) is not np:
        return "query lies on the GPU; the tracer reads host memory (NumPy arrays)"
    return launcher.unsupported_by_kernels(call)


def attend(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse` with the teaching kernels; an open `recording` keeps the trace."""
    num_threads = _recordings[-1][1] if _recordings else launcher.NUM_THREADS
    launch = launcher.launch(call, num_threads)
    trace = run(launch.kernel, launch.grid, launch.num_threads, *launch.args)
    for traces, _ in _recordings:
        traces.append(trace)


@contextmanager
def recording(num_threads: int = launcher.NUM_THREADS) -> Iterator[list[Trace]]:
    """The traces of all calls inside: `with recording() as traces: paged_attention(..., backend="trace")`.

    Fewer threads (a power of two) make a picture that fits on a screen; the kernels run with any number.
    """
    traces: list[Trace] = []
    _recordings.append((traces, num_threads))
    try:
        yield traces
    finally:
        _recordings.pop()


_recordings: list[tuple[list[Trace], int]] = []  # of each open `recording`: its traces, and the threads of a CUDA block


def _dim3(size: Size) -> Dim3:
    return Dim3(*size) if isinstance(size, tuple) else Dim3(int(size))


class _Thread:
    """A CUDA thread. `waiting` is where it waits for others: None before its start and after its end."""

    __slots__ = ("greenlet", "index", "number", "result", "waiting")

    def __init__(self, number: int, index: Dim3, greenlet: Any) -> None:
        self.number, self.index, self.greenlet = number, index, greenlet
        self.waiting: WaitPoint | None = None
        self.result: Any = None  # what the thread gets when it goes on


class _Machine:
    """One launch: its threads, its memory and its record."""

    def __init__(self, function: Any, grid: Dim3, block_dim: Dim3, args: tuple[Any, ...]) -> None:
        import greenlet  # imported here, so that this module loads without it and can name it as missing

        self.greenlet, self.hub = greenlet.greenlet, greenlet.getcurrent()
        self.function, self.grid, self.block_dim = function, grid, block_dim
        self.kernel = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        self.num_threads = math.prod(block_dim)
        self.thread, self.clock, self.barrier_clock = 0, 0, 0
        self.warp_clock: list[int] = []
        self.log = array("i")  # five numbers for each access: see traced_memory.Machine
        # (length of the log, number of the CUDA block, its barriers) at the beginning of each round
        self.rounds: list[tuple[int, int, int]] = []
        self.sites = Sites()
        self.site_of = self.sites.of  # called at each access
        self.arrays: list[ArrayInfo] = []
        self.array_at: dict[int, int] = {}  # site to the number of the shared or local array made there
        self.shared: dict[int, Any] = {}  # the CUDA block's shared arrays by site
        self.cuda = Cuda(self)
        self.rebuilder = Rebuilder(self.cuda)
        self.entry = self.rebuilder.rebuild(function)
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        if len(names) != len(args):
            raise TypeError(f"{self.kernel} takes {plural(len(names), 'argument')}; {len(args)} given")
        self.args = [self._argument(name, arg) for name, arg in zip(names, args, strict=True)]

    def run(self) -> Trace:
        with np.errstate(all="ignore"):  # a GPU does not warn
            for number in range(math.prod(self.grid)):
                self._run_block(number)
        return self._trace()

    # ---- threads

    def _run_block(self, number: int) -> None:
        self.cuda.blockIdx = self.grid.place(number)
        self.shared = {}
        self.barrier_clock, self.warp_clock = self.clock, [0] * (self.num_threads // WARP_SIZE + 1)
        threads = [self._thread(t) for t in range(self.num_threads)]
        barriers, running = 0, threads
        self.rounds.append((len(self.log), number, barriers))
        try:
            while running:
                for thread in running:
                    self._run_thread(thread)
                running = self._release_warps(threads)
                if not running:
                    running = self._release_block(threads)
                    barriers += 1
                    self.rounds.append((len(self.log), number, barriers))
        finally:
            for thread in threads:
                thread.greenlet.throw()  # ends the threads that an error left unfinished

    def _thread(self, number: int) -> _Thread:
        green = self.greenlet(lambda _: self.entry(*self.args))
        green.gr_context = contextvars.copy_context()  # np.errstate holds in there, too
        return _Thread(number, self.block_dim.place(number), green)

    def _run_thread(self, thread: _Thread) -> None:
        """Let the thread run until it waits or ends."""
        self.thread, self.cuda.threadIdx = thread.number, thread.index
        self.cuda.laneid = thread.number % WARP_SIZE
        try:
            thread.waiting = thread.greenlet.switch(thread.result)
        except Fault as fault:
            raise self._located(str(fault), fault.__traceback__) from None
        except Exception as error:
            raise self._located(f"{type(error).__name__}: {error}", error.__traceback__) from error

    def _release_warps(self, threads: list[_Thread]) -> list[_Thread]:
        """Complete each warp operation whose lanes have all arrived; return the threads that go on."""
        released: list[_Thread] = []
        for start in range(0, len(threads), WARP_SIZE):
            warp = threads[start : start + WARP_SIZE]
            arrived: dict[tuple[Any, ...], dict[int, _Thread]] = {}  # by operation: its threads by lane
            for lane, thread in enumerate(warp):
                if thread.waiting is not None and thread.waiting.mask is not None:
                    arrived.setdefault(thread.waiting[:3], {})[lane] = thread
            for (kind, _, mask), lanes in arrived.items():
                if any(mask >> lane & 1 and lane not in lanes for lane in range(len(warp))):
                    continue
                if kind == "syncwarp":
                    self.clock += 1
                    self.warp_clock[start // WARP_SIZE] = self.clock
                released += self._complete(lanes)
        return sorted(released, key=lambda thread: thread.number)

    def _release_block(self, threads: list[_Thread]) -> list[_Thread]:
        """All threads stand still: at the block's barrier, or at their end. Anything else is an error."""
        first = next((thread for thread in threads if thread.waiting is not None), None)
        if first is None or first.waiting is None:
            return []
        wanted = first.waiting
        if wanted.mask is not None:  # lanes of its warp are missing: no other warp matters
            warp = threads[first.number // WARP_SIZE * WARP_SIZE :][:WARP_SIZE]
            threads = [thread for lane, thread in enumerate(warp) if wanted.mask >> lane & 1]
        for other in threads:
            if other.waiting is None:
                where = "has returned"
            elif other.waiting[:2] != wanted[:2]:
                where = f"waits in cuda.{other.waiting.kind} at line {self.sites.line(other.waiting.site)}"
            elif other.waiting.mask != wanted.mask:
                where = f"names the mask {other.waiting.mask:#x}, not {wanted.mask:#x}"
            else:
                continue
            name = self.thread_name(other.number)
            raise self._error(f"waits in cuda.{wanted.kind}, which {name} does not reach: it {where}", first)
        self.clock += 1
        self.barrier_clock = self.clock
        return self._complete(dict(enumerate(threads)))

    def _complete(self, group: dict[int, _Thread]) -> list[_Thread]:
        """Give each thread of the operation its result, from the values of all."""
        points = {place: thread.waiting for place, thread in group.items() if thread.waiting is not None}
        values = {place: point.value for place, point in points.items()}
        for place, point in points.items():
            thread = group[place]
            if point.mask is not None and not point.mask >> place & 1:
                raise self._error(f"lane {place} is not in the mask {point.mask:#x} that it names", thread)
            try:
                thread.result = point.answer(place, values)
            except Fault as fault:
                raise self._error(str(fault), thread) from None
        return list(group.values())

    # ---- errors

    def thread_name(self, number: int) -> str:
        return f"thread {tuple(self.block_dim.place(number))}"

    def _error(self, what: str, thread: _Thread) -> KernelError:
        """An error of a thread that waits."""
        assert thread.waiting is not None
        file, line = self.sites.file(thread.waiting.site), self.sites.line(thread.waiting.site)
        return KernelError(what, self.kernel, self.cuda.blockIdx, thread.index, file, line)

    def _located(self, what: str, traceback: TracebackType | None) -> KernelError:
        """An error of the running thread, at the last line of the kernel that the traceback goes through."""
        ours = {function.__code__ for function in self.rebuilder.functions}
        file, line = self.function.__code__.co_filename, 0
        while traceback is not None:
            if traceback.tb_frame.f_code in ours:
                file, line = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
            traceback = traceback.tb_next
        return KernelError(what, self.kernel, self.cuda.blockIdx, self.cuda.threadIdx, file, line)

    # ---- memory

    def _argument(self, name: str, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            self.arrays.append(ArrayInfo(name, "global", value.shape, value.strides, value.dtype))
            return TracedArray(self, len(self.arrays) - 1, self.arrays[-1], value, None)
        return int(value) if isinstance(value, np.integer) else value

    def shared_array(self, shape: Any, dtype: Any, alignment: int | None = None) -> TracedArray:
        """One for each CUDA block and each place in the kernel. `alignment` has no meaning here."""
        site = self.site_of(sys._getframe(1))
        if site not in self.shared:
            self.shared[site] = self._own_array(site, "shared", shape, dtype)
        made: TracedArray = self.shared[site]
        return made

    def local_array(self, shape: Any, dtype: Any, alignment: int | None = None) -> TracedArray:
        return self._own_array(self.site_of(sys._getframe(1)), "local", shape, dtype)

    def _own_array(self, site: int, space: str, shape: Any, dtype: Any) -> TracedArray:
        data = np.zeros(shape, dtype=dtype.dtype if isinstance(dtype, Integer) else dtype)
        if not data.size:
            raise Fault(f"an array of shape {shape}: the tracer has no dynamic shared memory")
        if site not in self.array_at:
            self.array_at[site] = len(self.arrays)
            self.arrays.append(ArrayInfo(self.sites.variable(site), space, data.shape, data.strides, data.dtype))
        number = self.array_at[site]
        guard: Any = SharedGuard(data.size, self) if space == "shared" else LocalGuard(data.size)
        return TracedArray(self, number, self.arrays[number], data, guard)

    # ---- the record

    def _trace(self) -> Trace:
        rows = np.array(self.log, dtype=np.int32).reshape(-1, 5)
        site, thread, number, index, write = (np.ascontiguousarray(column) for column in rows.T)
        sites, place = np.unique(site, return_inverse=True)
        line = np.array([self.sites.line(int(s)) for s in sites], dtype=np.int32)[place]
        begin, block, barriers = np.array(self.rounds, dtype=np.int32).reshape(-1, 3).T
        length = np.diff(np.append(begin, len(self.log))) // 5
        return Trace(
            kernel=self.kernel, function=self.function,
            grid=self.grid, block_dim=self.block_dim, arrays=tuple(self.arrays),
            block=np.repeat(block, length), round=np.repeat(barriers, length),
            thread=thread, line=line, site=site, array=number, index=index, write=write.astype(bool),
        )  # fmt: skip
