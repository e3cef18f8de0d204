"""Backend `trace`: runs any CUDA kernel on the CPU, unchanged, and records every read and write.

The kernel's Python function is built again with other globals: `cuda` is a stand-in, and the arguments are
recording arrays. Each CUDA thread is a greenlet. It runs until its next barrier, shuffle or end, then the
next thread does; when all have arrived, the round after the barrier begins. So a run is deterministic, and
a barrier that some threads never reach is seen at once. CUDA blocks run one after another.

Arithmetic is the device's: float32 stays float32, integers are wide. Two things differ in the last bit: a
GPU fuses `a * b + c` into one rounding, and its exp and log are approximations.
"""

from __future__ import annotations

import contextvars
import dis
import importlib.util
import sys
from array import array
from contextlib import contextmanager
from functools import cache
from linecache import getline
from pathlib import Path

import numpy as np

from ..core.attention import cuda as launcher
from ..core.device import module_of
from .access_record import WARP_SIZE, Access, ArrayInfo, Trace, WarpAccess
from .traced_cuda import Cuda, Index, Integer, Rebuilder
from .traced_memory import Fault, LocalGuard, SharedGuard, traced_array

__all__ = ["Access", "KernelError", "Trace", "WarpAccess", "recording", "run"]


class KernelError(Exception):
    """A kernel did what it must not do. The message says what, in which thread, and at which line."""

    def __init__(self, what, kernel, block, thread, file, line):
        self.what, self.kernel, self.block, self.thread, self.line = what, kernel, block, thread, line
        super().__init__(
            f"{kernel}, block {tuple(block)}, thread {tuple(thread)}, {Path(file).name}:{line}: {what}\n"
            f"    {getline(file, line).strip()}"
        )


def run(kernel, grid, block, *args) -> Trace:
    """Run `kernel[grid, block](*args)` on NumPy arrays, and return the record of its accesses.

    `kernel` is what `cuda.jit` made, or its Python function; `grid` and `block` are an int or a tuple of up
    to three. Arrays are changed in place. Raises KernelError.
    """
    return _Machine(getattr(kernel, "py_func", kernel), _index(grid), _index(block), args).run()


def unavailable() -> str | None:
    """Why this backend cannot run on this machine; None where it can."""
    if importlib.util.find_spec("greenlet") is None:
        return "it needs the package greenlet"
    return None


def unsupported(call) -> str | None:
    """Why this backend cannot run this call; None where it can."""
    if module_of(call.query) is not np:
        return "query lies on the GPU; the tracer reads host memory (NumPy arrays)"
    return launcher.unsupported_by_kernels(call)


def attention(call) -> None:
    """Fill `call.out` and `call.lse` with the teaching kernels; an open `recording` keeps the trace."""
    num_threads = _recordings[-1][1] if _recordings else launcher.NUM_THREADS
    kernel, grid, block, args = launcher.launch(call, num_threads)
    trace = run(kernel, grid, block, *args)
    for traces, _ in _recordings:
        traces.append(trace)


@contextmanager
def recording(num_threads=launcher.NUM_THREADS):
    """The traces of all calls inside: `with recording() as traces: paged_attention(..., backend="trace")`.

    Fewer threads (a power of two) make a picture that fits on a screen; the kernels run with any number.
    """
    traces: list[Trace] = []
    _recordings.append((traces, num_threads))
    try:
        yield traces
    finally:
        _recordings.pop()


_recordings = []  # (traces, threads of a CUDA block) of each open `recording`


def _index(size) -> Index:
    return Index(*size) if isinstance(size, tuple) else Index(int(size))


class _Thread:
    """A CUDA thread. `stop` is where it waits for others, None before its start and after its end."""

    __slots__ = ("answer", "greenlet", "index", "number", "stop")

    def __init__(self, number, index, greenlet):
        self.number, self.index, self.greenlet, self.stop, self.answer = number, index, greenlet, None, None


class _Machine:
    """One launch: its threads, its memory and its record."""

    def __init__(self, function, grid, block_dim, args):
        import greenlet  # here, so that the module loads, and says what is missing, without it

        self.greenlet, self.hub = greenlet.greenlet, greenlet.getcurrent()
        self.function, self.grid, self.block_dim = function, grid, block_dim
        self.kernel = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        self.num_threads = block_dim.x * block_dim.y * block_dim.z
        self.thread, self.clock, self.barrier_clock, self.warp_clock = 0, 0, 0, []
        self.log = array("i")  # five numbers for each access: see traced_memory.Machine
        self.rounds = []  # (length of the log, number of the CUDA block, its barriers) as each round begins
        self.codes, self.sites = [], {}  # the code of each function; its places by id(code) and offset
        self.arrays = []
        self.array_at = {}  # place in the kernel to the number of the shared or local array made there
        self.cuda = Cuda(self)
        self.rebuilder = Rebuilder(self.cuda)
        self.entry = self.rebuilder.rebuild(function)
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        if len(names) != len(args):
            raise TypeError(f"{self.kernel} takes {len(names)} arguments; {len(args)} were given")
        self.args = [self._argument(name, arg) for name, arg in zip(names, args, strict=True)]

    def run(self) -> Trace:
        with np.errstate(all="ignore"):  # a GPU does not warn
            for number in range(self.grid.x * self.grid.y * self.grid.z):
                self._run_block(number)
        return self._trace()

    # ---- threads

    def _run_block(self, number):
        self.cuda.blockIdx = _at(number, self.grid)
        self.shared = {}
        self.barrier_clock, self.warp_clock = self.clock, [0] * (self.num_threads // WARP_SIZE + 1)
        threads = [self._thread(t) for t in range(self.num_threads)]
        barriers, running = 0, threads
        self.rounds.append((len(self.log), number, barriers))
        try:
            while running:
                for thread in running:
                    self._run_thread(thread)
                running = self._meet_in_warps(threads)
                if not running:
                    running = self._meet(threads)
                    barriers += 1
                    self.rounds.append((len(self.log), number, barriers))
        finally:
            for thread in threads:
                thread.greenlet.throw()  # ends those that an error left behind

    def _thread(self, number):
        green = self.greenlet(lambda _: self.entry(*self.args))
        green.gr_context = contextvars.copy_context()  # np.errstate holds in there, too
        return _Thread(number, _at(number, self.block_dim), green)

    def _run_thread(self, thread):
        """Let the thread run until it stops or ends."""
        self.thread, self.cuda.threadIdx = thread.number, thread.index
        self.cuda.laneid = thread.number % WARP_SIZE
        try:
            thread.stop = thread.greenlet.switch(thread.answer)
        except Fault as fault:
            raise self._located(str(fault), fault.__traceback__) from None
        except Exception as error:
            raise self._located(f"{type(error).__name__}: {error}", error.__traceback__) from error

    def _meet_in_warps(self, threads):
        """Answer each warp operation whose lanes have all come; return the threads that go on."""
        released = []
        for start in range(0, len(threads), WARP_SIZE):
            warp, waiting = threads[start : start + WARP_SIZE], {}
            for lane, thread in enumerate(warp):
                if thread.stop is not None and thread.stop.mask is not None:
                    waiting.setdefault(thread.stop[:3], {})[lane] = thread
            for (kind, _, mask), lanes in waiting.items():
                if any(mask >> lane & 1 and lane not in lanes for lane in range(len(warp))):
                    continue
                if kind == "syncwarp":
                    self.clock += 1
                    self.warp_clock[start // WARP_SIZE] = self.clock
                released += self._answer(lanes)
        return sorted(released, key=lambda thread: thread.number)

    def _meet(self, threads):
        """All threads stand still: at the block's barrier, or at their end. Anything else is an error."""
        first = next((thread for thread in threads if thread.stop is not None), None)
        if first is None:
            return []
        if first.stop.mask is not None:  # its warp did not get together: look no further
            warp = threads[first.number // WARP_SIZE * WARP_SIZE :][:WARP_SIZE]
            threads = [thread for lane, thread in enumerate(warp) if first.stop.mask >> lane & 1]
        for other in threads:
            if other.stop is None:
                where = "has returned"
            elif other.stop[:2] != first.stop[:2]:
                where = f"waits in cuda.{other.stop.kind} at line {self._line(other.stop.site)}"
            elif other.stop.mask != first.stop.mask:
                where = f"names the mask {other.stop.mask:#x}, not {first.stop.mask:#x}"
            else:
                continue
            name = self.thread_name(other.number)
            raise self._error(f"waits in cuda.{first.stop.kind}, which {name} does not reach: it {where}", first)
        self.clock += 1
        self.barrier_clock = self.clock
        return self._answer(dict(enumerate(threads)))

    def _answer(self, group):
        values = {place: thread.stop.value for place, thread in group.items()}
        for place, thread in group.items():
            if thread.stop.mask is not None and not thread.stop.mask >> place & 1:
                raise self._error(f"lane {place} is not in the mask {thread.stop.mask:#x} that it names", thread)
            try:
                thread.answer = thread.stop.answer(place, values)
            except Fault as fault:
                raise self._error(str(fault), thread) from None
        return list(group.values())

    # ---- errors

    def thread_name(self, number):
        return f"thread {tuple(_at(number, self.block_dim))}"

    def _error(self, what, thread):
        """An error of a thread that waits."""
        file = self.codes[thread.stop.site >> 20].co_filename
        return KernelError(what, self.kernel, self.cuda.blockIdx, thread.index, file, self._line(thread.stop.site))

    def _located(self, what, traceback):
        """An error of the running thread, at the last line of the kernel that the traceback goes through."""
        ours = {function.__code__ for function in self.rebuilder.functions}
        file, line = self.function.__code__.co_filename, 0
        while traceback is not None:
            if traceback.tb_frame.f_code in ours:
                file, line = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
            traceback = traceback.tb_next
        return KernelError(what, self.kernel, self.cuda.blockIdx, self.cuda.threadIdx, file, line)

    # ---- memory

    def _argument(self, name, value):
        if isinstance(value, np.ndarray):
            self.arrays.append(ArrayInfo(name, "global", value.shape, value.strides, value.dtype))
            return traced_array(self, len(self.arrays) - 1, self.arrays[-1], value, None)
        return int(value) if isinstance(value, np.integer) else value

    def shared_array(self, shape, dtype, alignment=None):
        """One for each CUDA block and each place in the kernel. `alignment` has no meaning here."""
        frame = sys._getframe(1)
        site = self.site_of(frame)
        if site not in self.shared:
            self.shared[site] = self._own_array(frame, "shared", shape, dtype)
        return self.shared[site]

    def local_array(self, shape, dtype, alignment=None):
        return self._own_array(sys._getframe(1), "local", shape, dtype)

    def _own_array(self, frame, space, shape, dtype):
        data = np.zeros(shape, dtype=dtype.dtype if isinstance(dtype, Integer) else dtype)
        if not data.size:
            raise Fault(f"an array of shape {shape}: the tracer has no dynamic shared memory")
        site = self.site_of(frame)
        if site not in self.array_at:
            self.array_at[site] = len(self.arrays)
            name = _name_assigned(frame.f_code, site & 0xFFFFF)
            self.arrays.append(ArrayInfo(name, space, data.shape, data.strides, data.dtype))
        number = self.array_at[site]
        guard = SharedGuard(data.size, self) if space == "shared" else LocalGuard(data.size)
        return traced_array(self, number, self.arrays[number], data, guard)

    # ---- the record

    def site_of(self, frame):
        """The place in the kernel where `frame` is, as a number; `_line` looks its line up, later."""
        sites = self.sites.get(id(frame.f_code))
        if sites is None:
            self.codes.append(frame.f_code)
            first = len(self.codes) - 1 << 20
            sites = self.sites[id(frame.f_code)] = [first | place for place in _places(frame.f_code)]
        return sites[frame.f_lasti // 2]

    def _line(self, site):
        return _lines(self.codes[site >> 20])[(site & 0xFFFFF) // 2]

    def _trace(self):
        rows = np.array(self.log, dtype=np.int32).reshape(-1, 5)
        site, thread, number, index, write = (np.ascontiguousarray(column) for column in rows.T)
        sites, place = np.unique(site, return_inverse=True)
        line = np.array([self._line(int(s)) for s in sites], dtype=np.int32)[place]
        begin, block, barriers = np.array(self.rounds, dtype=np.int32).reshape(-1, 3).T
        length = np.diff(np.append(begin, len(self.log))) // 5
        return Trace(
            kernel=self.kernel, function=self.function,
            grid=tuple(self.grid), block_dim=tuple(self.block_dim), arrays=tuple(self.arrays),
            block=np.repeat(block, length), round=np.repeat(barriers, length),
            thread=thread, line=line, site=site, array=number, index=index, write=write.astype(bool),
        )  # fmt: skip


def _at(number, size) -> Index:
    """The place of the CUDA block or thread with this number in a grid or block of this size."""
    return Index(number % size.x, number // size.x % size.y, number // (size.x * size.y))


@cache
def _lines(code):
    """The source line of each instruction."""
    return [position[0] for position in code.co_positions()]


@cache
def _places(code):
    """For each two bytes of the code, the offset that stands for their place in the source.

    A frame's own offset is not enough: once Python has specialised an instruction, the frame may stand at
    its end, and the compiler may have copied one call of the source into two branches.
    """
    steps = {step.offset: step for step in dis.get_instructions(code)}
    places, first = [], {}
    for offset in range(0, len(code.co_code), 2):
        step = steps.get(offset)
        if step is None:  # inside an instruction
            places.append(places[-1])
        elif step.positions.col_offset is None:  # Python was told to keep no columns
            places.append(offset)
        else:
            places.append(first.setdefault((step.opname, step.positions), offset))
    return places


@cache
def _name_assigned(code, at):
    """The variable in which the result of the call at `at` is stored."""
    for step in dis.get_instructions(code):
        if step.offset > at and step.opname.startswith("STORE"):
            return step.argval[0] if isinstance(step.argval, tuple) else str(step.argval)
    return "array"
