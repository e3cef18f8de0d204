"""`cupy.ndarray` of the stand-in: NumPy memory behind CuPy's rules.

It refuses what CuPy refuses: to become a NumPy array by itself, NumPy arrays and lists where an array of the device is
needed, dtypes that CuPy lacks, copies between unequal dtypes and shapes. What CuPy has and the stand-in lacks raises
NotImplementedError; what CuPy lacks raises AttributeError.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import memory, order
from .memory import MemoryPointer
from .order import Access, enqueue, join, note_wait, refuse_in_capture

CUPY: dict[str, Any] = json.loads(Path(__file__).with_name("cupy_names.json").read_text(encoding="utf-8"))
DTYPES = {np.dtype(code) for code in "?bhilqBHILQefdFD"}
SCALARS = (int, float, bool, complex, np.generic)


def missing(owner: str, name: str, known: Any) -> Exception:
    """The error for a name that the stand-in has not."""
    if name in known:
        return NotImplementedError(f"{owner}.{name} is in CuPy, and not in the stand-in (tests/strict_gpu)")
    return AttributeError(f"{owner} has no attribute {name!r}")


def checked_dtype(dtype: Any) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(dtype)
    if found not in DTYPES:
        raise ValueError(f"Unsupported dtype {found}")
    return found


def operand(value: Any) -> Any:
    """An array of the device or a number; CuPy's kernels take nothing else."""
    if not isinstance(value, (ndarray, *SCALARS)):
        raise TypeError(f"Unsupported type {type(value)}")
    return value


def plain(value: Any) -> Any:
    """The NumPy array behind an array of the device; anything else as it is."""
    return value._a if isinstance(value, ndarray) else value


def accesses(*values: Any) -> list[Access]:
    return [value.access() for value in values if isinstance(value, ndarray)]


def store(out: ndarray, inputs: tuple[Any, ...], compute: Callable[[], Any], name: str) -> ndarray:
    """Enqueue `out[...] = compute()`."""

    def run() -> None:
        with np.errstate(all="ignore"):
            out._a[...] = compute()

    if out.size:
        enqueue(accesses(*inputs), accesses(out), name, run)
    return out


def new(inputs: tuple[Any, ...], compute: Callable[[], Any], name: str) -> ndarray:
    """A new array with what `compute` gives. It is computed here once more, for its shape and dtype."""
    with np.errstate(all="ignore"):
        value = np.asarray(compute())
    out = ndarray(value.shape, value.dtype)
    first = [value] if order.current_stream().captured is None else []
    return store(out, inputs, lambda: first.pop() if first else compute(), name)


class Flags:
    """CuPy's flags can be read, and have no `writeable`."""

    __slots__ = ("c_contiguous", "f_contiguous", "owndata")

    def __init__(self, array: ndarray) -> None:
        values = (array._a.flags.c_contiguous, array._a.flags.f_contiguous, array.base is None)
        for name, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"attribute {name!r} of flags is not writable")


class ndarray:  # noqa: N801
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]
    _a: np.ndarray
    data: MemoryPointer
    base: ndarray | None

    def __init__(self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None, order: Any = "C"):
        shape = tuple(map(operator.index, shape)) if hasattr(shape, "__len__") else (operator.index(shape),)
        if any(n < 0 for n in shape):
            raise ValueError("Negative dimensions are not allowed")
        dtype = np.dtype(dtype) if memptr is not None else checked_dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        pointer = memory.allocate(size) if memptr is None else memptr
        allocation = pointer.mem.allocation
        if size:  # NumPy refuses an array that leaves its allocation; CuPy does not look
            array = np.ndarray(shape, dtype, allocation.bytes, pointer.ptr - allocation.ptr, strides, order)
        else:
            array = np.empty(shape, dtype)
        self.__dict__.update(_a=array, data=pointer, base=None)

    def _view(self, array: np.ndarray) -> ndarray:
        """`array`, a view of this array's memory, as an array of the device."""
        view = object.__new__(ndarray)
        start = array.__array_interface__["data"][0] - self.data.ptr if array.size else 0
        view.__dict__.update(_a=array, data=self.data + start, base=self)
        return view

    def access(self, index: Any = None) -> Access:
        return Access(self.data.mem.allocation, self._a, index)

    def __getattr__(self, name: str) -> Any:
        raise missing("cupy.ndarray", name, CUPY["ndarray"])

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "shape":
            raise AttributeError(f"attribute {name!r} of cupy.ndarray cannot be set")
        self.__dict__["_a"] = self.reshape(value)._a

    # --- what it is ------------------------------------------------------------------------------------------------

    shape = property(lambda self: self._a.shape)
    dtype = property(lambda self: self._a.dtype)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    nbytes = property(lambda self: self._a.nbytes)
    itemsize = property(lambda self: self._a.itemsize)
    strides = property(lambda self: self._a.strides)
    flags = property(Flags)
    T = property(lambda self: self._view(self._a.T))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape, "typestr": self.dtype.str, "descr": [("", self.dtype.str)], "version": 3,
            "strides": None if self.flags.c_contiguous else self.strides, "data": (self.data.ptr, False),
            "stream": order.current_stream().ptr or 1,
        }  # fmt: skip

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array."
        )

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("len() of unsized object")
        return int(self.shape[0])

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    # --- to and from the host --------------------------------------------------------------------------------------

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        from .order import current_stream

        stream = current_stream() if stream is None else stream
        source = self
        if out is not None:
            _check_partner(self, out, "obtained from")
            if not (out.flags.c_contiguous and self.flags.c_contiguous):
                if not out.flags.c_contiguous:
                    raise RuntimeError("`out` cannot be specified when copying to non-contiguous ndarray")
                source = ascontiguousarray(self)
        else:
            source = ascontiguousarray(self) if self.size and not self.flags.c_contiguous else self
            out = np.empty(self.shape, self.dtype)
        refuse_in_capture("D2H transfers", stream)
        host = out.view(np.ndarray)
        allocation = memory.host_allocation_of(host)
        if allocation is None:  # the copy of plain memory is done when the call returns
            blocking = True
        writes = [Access(allocation, host)] if allocation else []
        if self.size:
            enqueue(accesses(source), writes, "copy to host", lambda: np.copyto(host, source._a), stream)
        if blocking:
            note_wait("get")
            join(_host_clock(), stream.whole_clock())
        result: np.ndarray = out
        return result

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        _check_partner(self, arr, "set to")
        if not self.flags.c_contiguous:
            raise RuntimeError("Cannot set to non-contiguous array")
        refuse_in_capture("H2D transfers", stream)
        host = np.ascontiguousarray(arr.view(np.ndarray))
        if self.size:
            enqueue(_host_reads(host), accesses(self), "copy to device", lambda: np.copyto(self._a, host), stream)

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def __bool__(self) -> bool:
        if self.size > 1:
            raise ValueError("The truth value of an array with more than one element is ambiguous.")
        return bool(self.size and self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __repr__(self) -> str:
        return repr(self.get())

    def __format__(self, spec: str) -> str:
        return format(self.get(), spec)

    # (CuPy's arrays have no __index__.)

    # --- shapes ----------------------------------------------------------------------------------------------------

    def view(self, dtype: Any = None) -> ndarray:
        if dtype is None or np.dtype(dtype).itemsize == self.itemsize:
            return self._view(self._a[...] if dtype is None else self._a.view(dtype))
        dtype = np.dtype(dtype)
        if not self.ndim:
            raise ValueError("Changing the dtype of a 0d array is only supported if the itemsize is unchanged")
        if self.shape[-1] != 1 and self.size and self.strides[-1] != self.itemsize:
            raise ValueError("To change to a dtype of a different size, the last axis must be contiguous")
        length = self.shape[-1] * self.itemsize
        if length % dtype.itemsize:
            raise ValueError("When changing to a larger dtype, its size must be a divisor of the last axis in bytes")
        shape = (*self.shape[:-1], length // dtype.itemsize)
        return ndarray(shape, dtype, self.data, (*self.strides[:-1], dtype.itemsize))

    def reshape(self, *shape: Any, order: str = "C", copy: Any = None) -> ndarray:
        if order not in ("C", "c"):
            raise NotImplementedError("the stand-in reshapes in order C alone")
        if len(shape) == 1 and hasattr(shape[0], "__len__"):
            shape = tuple(shape[0])
        sizes = [operator.index(n) for n in shape]
        if sizes.count(-1) > 1:
            raise ValueError("can only specify only one unknown dimension")
        if -1 in sizes and (known := -math.prod(sizes)) and self.size % known == 0:
            sizes[sizes.index(-1)] = self.size // known
        if math.prod(sizes) != self.size or -1 in sizes:
            raise ValueError(f"cannot reshape array of size {self.size} into shape {shape}")
        if not self.size:
            return self._view(np.empty(sizes, self.dtype))
        strides = _strides_of_view(self._a, tuple(sizes))
        if strides is None:
            return self.copy().reshape(sizes)
        return self._view(np.lib.stride_tricks.as_strided(self._a, sizes, strides))

    def ravel(self, order: str = "C") -> ndarray:
        return (self if self.flags.c_contiguous else self.copy()).reshape(-1)

    def transpose(self, *axes: Any) -> ndarray:
        return self._view(self._a.transpose(*axes))

    def swapaxes(self, axis1: int, axis2: int) -> ndarray:
        return self._view(self._a.swapaxes(axis1, axis2))

    def squeeze(self, axis: Any = None) -> ndarray:
        return self._view(self._a.squeeze(axis))

    # --- copies ----------------------------------------------------------------------------------------------------

    def astype(self, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None, copy: bool = True) -> Any:
        if casting is not None or subok is not None:
            raise TypeError("casting is not supported yet")
        dtype = checked_dtype(dtype)
        if dtype == self.dtype and not copy:
            return self
        with np.errstate(all="ignore"):
            like = self._a.astype(dtype)  # in the order of its axes
        out = ndarray(like.shape, dtype)
        if like.size and not like.flags.c_contiguous:
            out = ndarray(like.shape, dtype, out.data, like.strides)
        return store(out, (self,), lambda: self._a.astype(dtype), "astype")

    def __deepcopy__(self, memo: Any) -> ndarray:
        return self.copy()

    def copy(self, order: str = "C") -> ndarray:
        return store(ndarray(self.shape, self.dtype), (self,), lambda: self._a, "copy")

    def fill(self, value: Any) -> None:
        if getattr(value, "shape", ()) != ():
            raise ValueError(f"non-scalar {type(value)} cannot be used for fill")
        number = plain(value) if isinstance(value, ndarray) else np.asarray(value, dtype=self.dtype)
        if number.shape != ():
            raise ValueError("a sequence cannot be used for fill")
        store(self, (value,), lambda: number, "fill")

    # --- indices ---------------------------------------------------------------------------------------------------

    def _index(self, slices: Any) -> tuple[list[Any], list[ndarray]]:
        """The parts of an index, lists as arrays of the device; and those that are arrays."""
        parts: list[Any] = []
        for part in slices if isinstance(slices, tuple) else (slices,):
            if part is None or part is Ellipsis or isinstance(part, ndarray):
                parts.append(part)
            elif isinstance(part, slice):
                for bound in (part.start, part.stop, part.step):
                    if bound is not None:
                        operator.index(bound)
                parts.append(part)
            elif np.isscalar(part) and not isinstance(part, (bool, np.bool_)):
                parts.append(operator.index(part))  # type: ignore[arg-type]
            else:
                empty = isinstance(part, (list, tuple)) and not part
                parts.append(array(part, dtype=np.int32 if empty else None))
        arrays = [part for part in parts if isinstance(part, ndarray)]
        for part in arrays:
            if part.dtype.kind not in "biu":
                raise IndexError(f"arrays used as indices must be of integer or boolean type. (actual: {part.dtype})")
        if any(part.dtype.kind == "b" for part in arrays):
            note_wait("index by booleans")
            refuse_in_capture("D2H transfers")
        return parts, arrays

    def _host_index(self, parts: list[Any]) -> tuple[Any, ...]:
        """The same index for NumPy. CuPy looks at no bound: integers wrap around."""
        axis, index = 0, []
        used = sum(
            part.ndim if isinstance(part, ndarray) and part.dtype.kind == "b" else part is not None
            for part in parts
            if part is not Ellipsis
        )
        for part in parts:
            if isinstance(part, ndarray) and part.dtype.kind != "b":
                index.append(part._a % max(1, self.shape[axis]))
            else:
                index.append(plain(part))
            if part is Ellipsis:
                axis += self.ndim - used
            elif part is not None:
                axis += part.ndim if isinstance(part, ndarray) and part.dtype.kind == "b" else 1
        return tuple(index)

    def __getitem__(self, slices: Any) -> ndarray:
        parts, arrays = self._index(slices)
        if not arrays:
            return self._view(self._a[(*parts, ...) if Ellipsis not in parts else tuple(parts)])
        like = self._a[self._host_index(parts)]
        out = ndarray(like.shape, self.dtype)

        def run() -> None:
            out._a[...] = self._a[self._host_index(parts)]

        if out.size:
            enqueue(lambda: [*accesses(*arrays), self.access(self._host_index(parts))], accesses(out), "take", run)
        return out

    def __setitem__(self, slices: Any, value: Any) -> None:
        parts, arrays = self._index(slices)
        if not arrays:
            target = self[slices]
            if not isinstance(value, ndarray):
                target.fill(value)  # refuses NumPy arrays and lists, as CuPy does
                return
            source = value
            while source.ndim > target.ndim and source.shape[0] == 1:
                source = source[0]
            np.broadcast_to(source._a, target.shape)  # refuses what does not fit
            if target.shape == source.shape and (target.strides, target.data.ptr) == (source.strides, source.data.ptr):
                return  # in-place operators assign what is there already
            store(target, (source,), lambda: source._a.copy(), "copy")
            return
        source = value if isinstance(value, ndarray) else array(value, dtype=self.dtype)

        def run() -> None:
            with np.errstate(all="ignore"):
                self._a[self._host_index(parts)] = source._a.astype(self.dtype)

        if self.size:
            writes = lambda: [self.access(self._host_index(parts))]  # noqa: E731
            enqueue(accesses(source, *arrays), writes, "scatter", run)


def _host_clock() -> order.Clock:
    return order.host_clock


def _check_partner(device: ndarray, host: Any, verb: str) -> None:
    """A copy between device and host is between a NumPy array and a CuPy array of one dtype and shape."""
    if not isinstance(host, np.ndarray):
        raise TypeError(f"Only numpy.ndarray can be {verb} cupy.ndarray; this is {type(host)}")
    if device.dtype != host.dtype:
        raise TypeError(f"{host.dtype} array cannot be {verb} {device.dtype} array")
    if device.shape != host.shape:
        raise ValueError(f"Shape mismatch. Device shape: {device.shape}, host shape: {host.shape}")


def _host_reads(host: np.ndarray) -> list[Access]:
    allocation = memory.host_allocation_of(host)
    return [Access(allocation, host)] if allocation else []


def _strides_of_view(array: np.ndarray, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of the reshaped view, by CuPy's rule (_get_strides_for_nocopy_reshape); None where it copies."""
    if array.size == 1:
        return (array.itemsize,) * len(shape)
    sizes: list[int] = []
    steps: list[int] = []
    for size, step in zip(array.shape, array.strides, strict=True):  # neighbouring axes that are one
        if size == 1:
            continue
        if sizes and steps[-1] == size * step:
            sizes[-1] *= size
            steps[-1] = step
        else:
            sizes.append(size)
            steps.append(step)
    strides, axis, last = [], 0, sizes[0] * steps[0]
    for size in shape:
        if size > 1:
            if axis >= len(sizes) or sizes[axis] % size:
                return None
            sizes[axis] //= size
            last = sizes[axis] * steps[axis]
            axis += sizes[axis] == 1
        strides.append(last)
    return tuple(strides)


# --- making arrays -------------------------------------------------------------------------------------------------


def array(
    obj: Any, dtype: Any = None, copy: Any = True, order: str = "K", subok: bool = False, ndmin: int = 0,
    *, blocking: bool = False,
) -> ndarray:  # fmt: skip
    if isinstance(obj, ndarray):
        return obj.astype(obj.dtype if dtype is None else dtype, copy=bool(copy))  # type: ignore[no-any-return]
    if isinstance(obj, (list, tuple)) and obj and all(isinstance(part, ndarray) for part in obj):
        from .functions import stack

        joined = stack(obj)
        return joined if dtype is None else joined.astype(dtype, copy=False)
    host = np.array(obj, dtype=dtype, ndmin=ndmin)  # of a list with some arrays of the device: refused by __array__
    if host.ndim:
        refuse_in_capture("H2D transfers")
    out = ndarray(host.shape, checked_dtype(host.dtype))
    reads = []
    if isinstance(obj, np.ndarray) and obj.flags.c_contiguous and host.dtype == obj.dtype:
        pinned = obj.view(np.ndarray)
        if reads := _host_reads(pinned):
            host = pinned  # the device reads it later; plain memory is copied before the call returns
    if host.size:
        enqueue(reads, accesses(out), "copy to device", lambda: np.copyto(out._a, host))
    if blocking:
        note_wait("asarray")
    return out


def asarray(a: Any, dtype: Any = None, order: Any = None, *, copy: Any = None, blocking: bool = False) -> ndarray:
    return array(a, dtype, copy or False, blocking=blocking)


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    if not isinstance(a, ndarray):
        raise TypeError(f"Argument 'a' has incorrect type (expected cupy.ndarray, got {type(a)})")
    dtype = a.dtype if dtype is None else checked_dtype(dtype)
    if dtype == a.dtype and a.flags.c_contiguous:
        return a if a.ndim else a.reshape(1)
    return store(ndarray(a.shape or (1,), dtype), (a,), lambda: a._a, "copy")
