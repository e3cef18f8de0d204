"""Memory of the stand-in's device, and page-locked memory of the host: NumPy bytes that know who touched them last.

New memory holds 0xFF: NaN as a float, -1 as an integer. What is freed goes to the next that asks for its size on the
same stream, as in CuPy's pool; it is filled anew.
"""

from __future__ import annotations

import bisect
import math
from typing import Any, ClassVar

import numpy as np

from .order import Access, current_stream, enqueue, host_access

UNWRITTEN = 0xFF
ALIGNMENT = 512  # bytes, as CuPy's pool has it
_addresses: list[int] = []  # of all allocations, sorted
_by_address: dict[int, Allocation] = {}


class Allocation:
    """One piece of memory, and the last operation of each stream that wrote it and that read it.

    While one stream alone touches it, that is a number for the whole; from the second stream on, one for each byte. An
    older write may stay noted: what comes after the newer one comes after the older one too.
    """

    def __init__(self, size: int, on_host: bool = False) -> None:
        self.size, self.on_host = size, on_host
        self._room = np.empty(size + ALIGNMENT, np.uint8)
        skip = -self._room.ctypes.data % ALIGNMENT
        self.ptr = self._room.ctypes.data + skip if size else 0
        self.bytes = self._room[skip : skip + size]
        self.bytes[:] = UNWRITTEN
        # By stream: the number of an operation, or [size] of them.
        self._writes: dict[int, Any] = {}
        self._reads: dict[int, Any] = {}
        if size:
            bisect.insort(_addresses, self.ptr)
            _by_address[self.ptr] = self

    def close(self) -> None:
        if _by_address.get(self.ptr) is self:
            del _by_address[self.ptr], _addresses[bisect.bisect_left(_addresses, self.ptr)]

    def last_operations(self, access: Access, write: bool) -> list[tuple[int, int]]:
        """(stream, number) of the operations that must be done before this access."""
        if not access.view.size:
            return []
        noted = [*self._writes.items(), *(self._reads.items() if write else ())]
        return [
            (stream, numbers if isinstance(numbers, int) else int(self._part(numbers, access).max(initial=0)))
            for stream, numbers in noted
        ]

    def note(self, stream: int, number: int, access: Access, write: bool) -> None:
        """The access was made by this operation."""
        if not access.view.size:
            return
        noted = self._writes if write else self._reads
        if {*self._writes, *self._reads} <= {stream}:
            noted[stream] = number
            return
        for numbers in (self._writes, self._reads):
            for other, last in numbers.items():
                if isinstance(last, int):
                    numbers[other] = np.full(self.size, last, np.int32)
        if stream not in noted:
            noted[stream] = np.zeros(self.size, np.int32)
        part = self._bytes_of(noted[stream], access.view)
        part[... if access.index is None else access.index] = number

    def _part(self, numbers: np.ndarray, access: Access) -> Any:
        part = self._bytes_of(numbers, access.view)
        return part if access.index is None else part[access.index]

    def _bytes_of(self, numbers: np.ndarray, view: np.ndarray) -> np.ndarray:
        """Of `numbers [size]` those of the view's bytes: [*view.shape, itemsize]."""
        start = view.__array_interface__["data"][0] - self.ptr
        strides = (*(numbers.itemsize * stride for stride in view.strides), numbers.itemsize)
        found: np.ndarray = np.lib.stride_tricks.as_strided(numbers[start:], (*view.shape, view.itemsize), strides)
        return found


def allocation_at(address: int) -> Allocation | None:
    at = bisect.bisect_right(_addresses, address) - 1
    found = _by_address[_addresses[at]] if at >= 0 else None
    return found if found is not None and address < found.ptr + found.size else None


def host_allocation_of(array: np.ndarray) -> Allocation | None:
    """The page-locked memory in which the array lies; None for plain memory."""
    found = allocation_at(array.__array_interface__["data"][0]) if array.size else None
    return found if found is not None and found.on_host else None


# --- the device ----------------------------------------------------------------------------------------------------


class Memory:
    """Holds an allocation until nothing refers to it any more."""

    def __init__(self, allocation: Allocation, pool: MemoryPool | None, stream: int = 0) -> None:
        self.allocation, self._pool, self._stream = allocation, pool, stream
        self.ptr, self.size, self.device_id = allocation.ptr, allocation.size, 0

    def __del__(self) -> None:
        if self._pool is not None:
            self._pool.take_back(self.allocation, self._stream)
        else:
            self.allocation.close()


class MemoryPointer:
    def __init__(self, mem: Memory, offset: int) -> None:
        self.mem, self.ptr = mem, mem.ptr + offset

    def __int__(self) -> int:
        return self.ptr

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)


class MemoryHook:
    """Told of each allocation while it is entered."""

    name = "MemoryHook"
    active: ClassVar[list[MemoryHook]] = []

    def __enter__(self) -> MemoryHook:
        MemoryHook.active.append(self)
        return self

    def __exit__(self, *args: object) -> None:
        MemoryHook.active.remove(self)

    def malloc_postprocess(self, **of: int) -> None: ...
    def free_postprocess(self, **of: int) -> None: ...


class MemoryPool:
    def __init__(self) -> None:
        self._free: dict[tuple[int, int], list[Allocation]] = {}  # by stream and size
        self._used = 0

    def malloc(self, size: int) -> MemoryPointer:
        rounded = -(-size // ALIGNMENT) * ALIGNMENT
        stream = current_stream().ptr
        if waiting := self._free.get((stream, rounded)):
            allocation = waiting.pop()
            allocation.bytes[:] = UNWRITTEN
        else:
            allocation = Allocation(rounded)
        self._used += rounded
        for hook in MemoryHook.active:
            hook.malloc_postprocess(device_id=0, size=size, mem_size=rounded, mem_ptr=allocation.ptr, pmem_id=0)
        return MemoryPointer(Memory(allocation, self, stream), 0)

    def take_back(self, allocation: Allocation, stream: int) -> None:
        self._used -= allocation.size
        self._free.setdefault((stream, allocation.size), []).append(allocation)
        for hook in MemoryHook.active:
            hook.free_postprocess(device_id=0, mem_size=allocation.size, mem_ptr=allocation.ptr, pmem_id=0)

    def free_all_blocks(self, stream: Any = None) -> None:
        for allocations in self._free.values():
            for allocation in allocations:
                allocation.close()
        self._free.clear()

    def used_bytes(self) -> int:
        return self._used


pool = MemoryPool()
_allocator: list[Any] = [pool.malloc]


def without_pool(size: int) -> MemoryPointer:
    return MemoryPointer(Memory(Allocation(size), None), 0)


def set_allocator(allocator: Any = None) -> None:
    """None: each array is an allocation of its own."""
    _allocator[0] = allocator or without_pool


def allocate(size: int) -> MemoryPointer:
    pointer: MemoryPointer = _allocator[0](size) if size else without_pool(0)
    return pointer


def copy_2d(dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: int, stream: Any) -> None:
    """cudaMemcpy2DAsync. Both addresses must lie in memory of the kind that is said, page-locked on the host."""
    if width > min(dpitch, spitch) or max(dpitch, spitch) > 2**31 - 1:
        raise ValueError(f"cudaErrorInvalidPitchValue: width {width}, pitches {dpitch} and {spitch}")
    accesses = []
    for address, pitch, on_device in ((dst, dpitch, kind == 1), (src, spitch, kind == 2)):
        allocation = allocation_at(address)
        if allocation is None or allocation.on_host == on_device:
            raise ValueError(f"cudaErrorInvalidValue: address {address:#x} is not memory of this kind")
        start = address - allocation.ptr
        # NumPy refuses a view that leaves the allocation.
        view = np.ndarray((height, width), np.uint8, allocation.bytes, start, (pitch, 1))
        accesses.append(Access(allocation, view))
    to, source = accesses
    enqueue([source], [to], "copy 2d", lambda: np.copyto(to.view, source.view), stream)


# --- page-locked memory of the host --------------------------------------------------------------------------------


class Pinned(np.ndarray):
    """Page-locked memory that notes when the host looks at it, or writes it. Else a NumPy array, as CuPy's is."""

    def _note(self, write: bool) -> None:
        plain = self.view(np.ndarray)
        if (allocation := host_allocation_of(plain)) is not None:
            host_access(allocation, plain, write)

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        if isinstance(part, Pinned) and (not part.size or host_allocation_of(part.view(np.ndarray)) is not None):
            return part  # a view: nothing was read yet
        self._note(write=False)
        return part.view(np.ndarray) if isinstance(part, Pinned) else part

    def __setitem__(self, index: Any, value: Any) -> None:
        part = super().__getitem__(index)
        (part if isinstance(part, Pinned) else self)._note(write=True)
        super().__setitem__(index, value)

    def fill(self, value: Any) -> None:
        self._note(write=True)
        super().fill(value)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = (), **options: Any) -> Any:
        if out:
            options["out"] = tuple(_plain(array, write=True) for array in out)
        return getattr(ufunc, method)(*(_plain(array) for array in inputs), **options)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        writes_first = func is np.copyto
        plain = [_plain(arg, write=writes_first and number == 0) for number, arg in enumerate(args)]
        return func(*plain, **{name: _plain(value, write=name == "out") for name, value in kwargs.items()})


def _plain(value: Any, write: bool = False) -> Any:
    if isinstance(value, Pinned):
        value._note(write)
        return value.view(np.ndarray)
    return type(value)(_plain(part) for part in value) if type(value) in (list, tuple) else value


def empty_pinned(shape: Any, dtype: Any = float, order: Any = "C") -> Pinned:
    """cupyx.empty_pinned."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    array = np.ndarray(shape, dtype, pinned_bytes(size), order=order)
    pinned: Pinned = array.view(Pinned)
    return pinned


def pinned_bytes(size: int) -> np.ndarray:
    return Allocation(size, on_host=True).bytes
