"""The stand-ins for `numba.cuda`, `math` and Numba's types in a traced kernel.

`Rebuilder` makes the kernel's Python function again, with these in its globals and closure. Nothing is patched: the
kernel itself and numba stay as they are.
"""

from __future__ import annotations

import builtins
import math
import operator
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .access_record import WARP_SIZE, Dim3
from .traced_memory import Fault, TracedArray

Lanes = dict[int, Any]  # the value that each lane (or thread) handed in
Answer = Callable[[int, Lanes], Any]  # (own lane, all values) -> the result in this thread


def _nothing(lane: int, values: Lanes) -> None:
    """The answer of a barrier."""


class WaitPoint(NamedTuple):
    """Where a thread waits for other threads, the value that it hands in, and the function that answers it."""

    kind: str
    site: int
    mask: int | None  # the lanes that wait for each other; None: all threads of the CUDA block
    value: Any
    answer: Answer


class Cuda:
    """The names of `numba.cuda` that a kernel may use. The machine sets threadIdx, blockIdx and laneid."""

    warpsize = WARP_SIZE
    threadIdx: Dim3  # noqa: N815 (CUDA's names)
    blockIdx: Dim3  # noqa: N815
    laneid: int

    def __init__(self, machine: Any) -> None:
        self._machine = machine
        self.gridDim: Dim3 = machine.grid
        self.blockDim: Dim3 = machine.block_dim
        self.shared = types.SimpleNamespace(array=machine.shared_array)
        self.local = types.SimpleNamespace(array=machine.local_array)
        self.atomic = types.SimpleNamespace(
            **{name: _atomic(compute) for name, compute in _ATOMICS.items()}, cas=_compare_and_swap
        )

    def __getattr__(self, name: str) -> Any:
        raise Fault(f"the tracer knows no cuda.{name}")

    def grid(self, ndim: int) -> Any:
        place = tuple(b * n + t for b, n, t in zip(self.blockIdx, self.blockDim, self.threadIdx, strict=True))
        return place[0] if ndim == 1 else place[:ndim]

    def gridsize(self, ndim: int) -> Any:
        size = tuple(b * n for b, n in zip(self.gridDim, self.blockDim, strict=True))
        return size[0] if ndim == 1 else size[:ndim]

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        kind = np.float64 if np.float64 in (type(a), type(b), type(c)) else np.float32
        return kind(np.float64(a) * np.float64(b) + np.float64(c))

    def threadfence(self) -> None:
        """Threads run one at a time here: all see all writes."""

    threadfence_block = threadfence_system = threadfence

    # Barriers of the CUDA block

    def syncthreads(self) -> None:
        self._wait("syncthreads", None)

    def syncthreads_count(self, predicate: Any) -> Any:
        return self._wait("syncthreads_count", None, bool(predicate), lambda _, values: sum(values.values()))

    def syncthreads_and(self, predicate: Any) -> Any:
        return self._wait("syncthreads_and", None, bool(predicate), lambda _, values: int(all(values.values())))

    def syncthreads_or(self, predicate: Any) -> Any:
        return self._wait("syncthreads_or", None, bool(predicate), lambda _, values: int(any(values.values())))

    # Operations of a warp

    def syncwarp(self, mask: int = 0xFFFFFFFF) -> None:
        self._wait("syncwarp", mask)

    def shfl_sync(self, mask: int, value: Any, source: int) -> Any:
        return self._wait("shfl_sync", mask, value, lambda _, values: _of_lane(values, source % WARP_SIZE))

    def shfl_xor_sync(self, mask: int, value: Any, lane_mask: int) -> Any:
        return self._wait("shfl_xor_sync", mask, value, lambda lane, values: _of_lane(values, lane ^ lane_mask))

    def shfl_up_sync(self, mask: int, value: Any, delta: int) -> Any:
        return self._shift("shfl_up_sync", mask, value, -delta)

    def shfl_down_sync(self, mask: int, value: Any, delta: int) -> Any:
        return self._shift("shfl_down_sync", mask, value, delta)

    def _shift(self, kind: str, mask: int, value: Any, step: int) -> Any:
        def answer(lane: int, values: Lanes) -> Any:
            return _of_lane(values, lane + step if 0 <= lane + step < WARP_SIZE else lane)

        return self._wait(kind, mask, value, answer, depth=3)

    def all_sync(self, mask: int, predicate: Any) -> Any:
        return self._wait("all_sync", mask, bool(predicate), lambda _, values: all(values.values()))

    def any_sync(self, mask: int, predicate: Any) -> Any:
        return self._wait("any_sync", mask, bool(predicate), lambda _, values: any(values.values()))

    def ballot_sync(self, mask: int, predicate: Any) -> Any:
        def answer(_: int, values: Lanes) -> int:
            return sum(1 << lane for lane, true in values.items() if true)

        return self._wait("ballot_sync", mask, bool(predicate), answer)

    def warp_collective(self, kind: str, value: Any, answer: Answer) -> Any:
        """For the twin of an intrinsic: all lanes of the warp hand in a value, and each gets `answer(lane, values)`."""
        return self._wait(kind, 0xFFFFFFFF, value, answer, depth=3)

    def _wait(self, kind: str, mask: int | None, value: Any = None, answer: Answer = _nothing, depth: int = 2) -> Any:
        """Let the other threads run until all that take part have arrived; return this thread's answer."""
        site = self._machine.site_of(sys._getframe(depth))
        mask = None if mask is None else int(mask) & 0xFFFFFFFF
        return self._machine.hub.switch(WaitPoint(kind, site, mask, value, answer))


def _of_lane(values: Lanes, lane: int) -> Any:
    if lane not in values:
        raise Fault(f"a shuffle reads lane {lane}, which takes no part in it")
    return values[lane]


def _atomic(compute: Callable[[Any, Any], Any]) -> Any:
    def update(target: TracedArray, index: Any, value: Any) -> Any:
        return target.update(index, lambda old: compute(old, target.dtype.type(value)), sys._getframe(1))

    return update


def _compare_and_swap(target: TracedArray, index: Any, expected: Any, value: Any) -> Any:
    return target.update(index, lambda old: value if old == expected else old, sys._getframe(1))


_ATOMICS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "sub": operator.sub, "max": max, "min": min, "exch": lambda _, new: new,
    "and_": operator.and_, "or_": operator.or_, "xor": operator.xor,
}  # fmt: skip


class Math:
    """`math` as on the device: float32 in, float32 out, and inf or NaN in place of an exception."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(math, name)
        if not callable(value):
            return value  # math.inf, math.pi
        function = getattr(np, name, value)

        def like_the_device(*args: Any) -> Any:
            result = function(*(np.float64(x) for x in args))
            if name in ("floor", "ceil", "trunc"):
                return int(result)
            narrow = all(isinstance(x, np.float32 | np.float16) for x in args)
            return np.float32(result) if narrow and isinstance(result, float) else result

        setattr(self, name, like_the_device)
        return like_the_device


class Integer:
    """numba.int32 and the other integer types: a cast, after which the number is wide, as in a compiled kernel."""

    def __init__(self, name: str) -> None:
        self.dtype = np.dtype(name)
        self.bits = self.dtype.itemsize * 8

    def __call__(self, value: Any) -> int:
        low = int(value) & ((1 << self.bits) - 1)
        return low - (1 << self.bits) if self.dtype.kind == "i" and low >> (self.bits - 1) else low


class Module:
    """A module whose contents are replaced as a kernel's globals are."""

    def __init__(self, module: types.ModuleType, replace: Callable[[Any], Any]) -> None:
        self._module, self._replace = module, replace

    def __getattr__(self, name: str) -> Any:
        return self._replace(getattr(self._module, name))


class Rebuilder:
    """Makes a kernel's function again, and each device function that it calls, with stand-ins inside."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.math = cuda, Math()
        self.functions: dict[Any, types.FunctionType] = {}  # original to rebuilt

    def rebuild(self, function: Any) -> types.FunctionType:
        if function in self.functions:
            return self.functions[function]
        names: dict[str, Any] = {"__builtins__": builtins}
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        new = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
        new.__kwdefaults__ = function.__kwdefaults__
        self.functions[function] = new  # before its names, which may include itself
        for name in function.__code__.co_names:
            if name in function.__globals__:
                names[name] = self.replace(function.__globals__[name])
        for cell, old in zip(cells, function.__closure__ or (), strict=True):
            cell.cell_contents = self.replace(old.cell_contents)
        return new

    def replace(self, value: Any) -> Any:
        """The stand-in for `value`, which a kernel finds in its globals or its closure."""
        if hasattr(value, "traced_as"):  # an intrinsic has no Python body; this is its twin in Python
            return self.rebuild(value.traced_as)
        if hasattr(value, "py_func"):
            return self.rebuild(value.py_func)
        if isinstance(value, types.ModuleType):
            if value.__name__ == "numba.cuda":
                return self.cuda
            if value is math:
                return self.math
            if value.__name__ == "numba" or (value.__name__.startswith("numba.") and hasattr(value, "float32")):
                return Module(value, self.replace)
        if type(value).__module__.startswith("numba."):
            if hasattr(value, "bitwidth"):  # the type of a number
                return getattr(np, value.name) if value.name.startswith("float") else Integer(value.name)
            if type(value).__name__ == "Boolean":
                return bool
        return value
