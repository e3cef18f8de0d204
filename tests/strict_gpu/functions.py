"""CuPy's functions on the stand-in's arrays: those that the project calls."""

from __future__ import annotations

import builtins
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .arrays import (
    CUPY,
    SCALARS,
    array,
    asarray,
    ascontiguousarray,
    checked_dtype,
    missing,
    ndarray,
    new,
    operand,
    plain,
    store,
)  # fmt: skip
from .order import note_wait, refuse_in_capture

# --- elementwise -----------------------------------------------------------------------------------------------------


class ufunc:  # noqa: N801
    """An elementwise function: of arrays of the device and numbers, with no other keywords than CuPy's."""

    def __init__(self, name: str, nin: int, nout: int) -> None:
        self.__name__, self.nin, self.nout = name, nin, nout
        self._numpy = getattr(np, name)

    def __call__(self, *args: Any, out: Any = None, dtype: Any = None, casting: str = "same_kind", **wrong: Any) -> Any:
        if wrong:
            raise TypeError(f"Wrong arguments {sorted(wrong)}")
        if not self.nin <= len(args) <= self.nin + self.nout:
            raise TypeError(f"Wrong number of arguments for {self.__name__!r}")
        inputs = tuple(operand(value) for value in args[: self.nin])
        given = out if isinstance(out, tuple) else (out,) if out is not None else args[self.nin :]

        def compute(which: int) -> Any:
            values = self._numpy(*map(plain, inputs), **({} if dtype is None else {"dtype": dtype}))
            return values[which] if self.nout > 1 else values

        results = []
        for which in range(self.nout):
            result = new_or(inputs, functools.partial(compute, which), self.__name__, given[which:], casting)
            results.append(result)
        return results[0] if self.nout == 1 else tuple(results)

    def __getattr__(self, name: str) -> Any:
        raise missing(f"cupy.{self.__name__}", name, ("at", "reduce", "accumulate", "reduceat", "outer"))


def new_or(
    inputs: tuple[Any, ...], compute: Callable[[], Any], name: str, given: Sequence[Any], casting: str = "same_kind"
) -> ndarray:
    """A new array with what `compute` gives, or the first of `given` filled with it."""
    if not given or given[0] is None:
        out = new(inputs, compute, name)
        checked_dtype(out.dtype)
        return out
    target = given[0]
    if not isinstance(target, ndarray):
        raise TypeError("Output arguments type must be cupy.ndarray")
    with np.errstate(all="ignore"):
        value = np.asarray(compute())
    if target.shape != np.broadcast_shapes(target.shape, value.shape):
        raise ValueError("Out shape is mismatched")
    if not np.can_cast(value.dtype, target.dtype, casting):  # type: ignore[arg-type]
        raise TypeError(f"Cannot cast {name} output from {value.dtype} to {target.dtype} with casting {casting!r}")
    return store(target, inputs, compute, name)


UFUNCS = {name: ufunc(name, *sizes) for name, sizes in CUPY["ufuncs"].items() if hasattr(np, name)}
COMPARISONS = {
    "lt": "less", "le": "less_equal", "eq": "equal", "ne": "not_equal", "gt": "greater", "ge": "greater_equal",
}  # fmt: skip


def _binary(name: str, reflected: bool) -> Callable[[ndarray, Any], Any]:
    def method(self: ndarray, other: Any) -> Any:
        if isinstance(other, np.ndarray) and not other.ndim and name in COMPARISONS.values():
            other = other.item()
        elif not isinstance(other, (ndarray, np.ndarray, *SCALARS)):
            raise TypeError(f"operand type(s) all returned NotImplemented from __array_ufunc__: {name}, {type(other)}")
        return UFUNCS[name](other, self) if reflected else UFUNCS[name](self, other)

    return method


def _inplace(name: str) -> Callable[[ndarray, Any], ndarray]:
    return lambda self, other: UFUNCS[name](self, other, out=self)


ARITHMETIC = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "power", "lshift": "left_shift", "rshift": "right_shift", "and": "bitwise_and",
    "or": "bitwise_or", "xor": "bitwise_xor",
}  # fmt: skip
for _operator, _name in ARITHMETIC.items():
    setattr(ndarray, f"__{_operator}__", _binary(_name, reflected=False))
    setattr(ndarray, f"__r{_operator}__", _binary(_name, reflected=True))
    setattr(ndarray, f"__i{_operator}__", _inplace(_name))
for _operator, _name in COMPARISONS.items():
    setattr(ndarray, f"__{_operator}__", _binary(_name, reflected=False))
for _operator, _name in {"neg": "negative", "abs": "absolute", "invert": "invert", "pos": "positive"}.items():
    setattr(ndarray, f"__{_operator}__", lambda self, _name=_name: UFUNCS[_name](self))


def _array_ufunc(self: ndarray, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
    """A NumPy function was called with an array of the device: CuPy's function of that name answers."""
    if method != "__call__":
        raise NotImplementedError(f"the stand-in has no ufunc method {method}")
    if ufunc.__name__ not in UFUNCS:
        return NotImplemented
    return UFUNCS[ufunc.__name__](*inputs, out=out, **options)


def _array_function(self: ndarray, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    function = FUNCTIONS.get(func.__name__)
    return function(*args, **kwargs) if function else NotImplemented


for _operator, _function in {"__array_ufunc__": _array_ufunc, "__array_function__": _array_function}.items():
    setattr(ndarray, _operator, _function)


# --- reductions ------------------------------------------------------------------------------------------------------


def _reduction(name: str, keywords: tuple[str, ...]) -> Callable[..., ndarray]:
    def method(
        self: ndarray, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False, **more: Any
    ) -> ndarray:
        if wrong := set(more) - set(keywords) | ({"dtype"} if dtype is not None and "dtype" not in keywords else set()):
            raise TypeError(f"cupy.{name} got an unexpected keyword argument {sorted(wrong)}")
        if dtype is not None:
            more["dtype"] = dtype
        if not self.size and name in ("max", "min", "argmax", "argmin"):
            # CuPy looks at the size of the answer first, and at what has no identity then.
            axes = (
                range(self.ndim)
                if axis is None
                else [a % self.ndim for a in (axis if isinstance(axis, tuple) else (axis,))]
            )
            shape = tuple(n for i, n in enumerate(self.shape) if i not in axes)
            if math.prod(shape):
                raise ValueError(f"zero-size array to reduction operation cupy_{name} which has no identity")
            return ndarray(shape, np.int64 if name.startswith("arg") else self.dtype)
        compute = lambda: getattr(self._a, name)(axis=axis, keepdims=keepdims, **more)  # noqa: E731
        return new_or((self,), compute, name, (out,))

    return method


REDUCTIONS = {
    "max": (), "min": (), "all": (), "any": (), "argmax": ("dtype",), "argmin": ("dtype",), "sum": ("dtype",),
    "prod": ("dtype",), "mean": ("dtype",), "var": ("dtype", "ddof"), "std": ("dtype", "ddof"),
}  # fmt: skip
for _name, _keywords in REDUCTIONS.items():
    setattr(ndarray, _name, _reduction(_name, _keywords))


def _method(name: str) -> Callable[..., Any]:
    def function(a: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(a, ndarray):
            raise TypeError(f"cupy.{name} takes a cupy.ndarray, not {type(a)}")
        return getattr(a, name)(*args, **kwargs)

    return function


def cumsum(a: ndarray, axis: Any = None, dtype: Any = None, out: Any = None) -> ndarray:
    return new_or((a,), lambda: np.cumsum(plain(a), axis, dtype), "cumsum", (out,))


def clip(a: ndarray, a_min: Any, a_max: Any, out: Any = None) -> ndarray:
    bounds = [None if bound is None else operand(bound) for bound in (a_min, a_max)]
    return new_or((a, *bounds), lambda: np.clip(a._a, *map(plain, bounds)), "clip", (out,))


def nan_to_num(x: ndarray, copy: bool = True, nan: float = 0.0, posinf: Any = None, neginf: Any = None) -> ndarray:
    return new((operand(x),), lambda: np.nan_to_num(plain(x), nan=nan, posinf=posinf, neginf=neginf), "nan_to_num")


def nonzero(a: ndarray) -> tuple[ndarray, ...]:
    note_wait("nonzero")
    refuse_in_capture("D2H transfers")
    return tuple(new((a,), lambda i=i: np.nonzero(a._a)[i], "nonzero") for i in range(a.ndim))  # type: ignore[misc]


# --- making ----------------------------------------------------------------------------------------------------------


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype, order=order)


def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    kind = fill_value.dtype if isinstance(fill_value, ndarray) else np.asarray(fill_value).dtype
    out = ndarray(shape, kind if dtype is None else dtype, order=order)
    out.fill(fill_value)
    return out


def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 0, dtype, order)


def ones(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 1, dtype, order)


def empty_like(prototype: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None) -> ndarray:
    if subok:
        raise TypeError("subok is not supported yet")
    return ndarray(prototype.shape if shape is None else shape, dtype or prototype.dtype)


def full_like(
    a: Any, fill_value: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None
) -> ndarray:
    out = empty_like(a, dtype, order, subok, shape)
    out.fill(fill_value)
    return out


def zeros_like(a: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None) -> ndarray:
    return full_like(a, 0, dtype, order, subok, shape)


def ones_like(a: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None) -> ndarray:
    return full_like(a, 1, dtype, order, subok, shape)


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> ndarray:
    if any(isinstance(bound, ndarray) for bound in (start, stop, step)):
        raise TypeError("cupy.arange of an array would make the host wait")
    first, end = (0, start) if stop is None else (start, stop)
    return new((), lambda: np.arange(first, end, step, dtype), "arange")  # type: ignore[call-overload]


def triu(m: ndarray, k: int = 0) -> ndarray:
    return new((m,), lambda: np.triu(plain(m), k), "triu")


def asnumpy(a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True) -> np.ndarray:
    return a.get(stream, order, out, blocking) if isinstance(a, ndarray) else np.asarray(a)


def from_dlpack(array: Any, *, device: Any = None, copy: Any = None) -> ndarray:
    if isinstance(array, ndarray):
        return array.view()
    raise NotImplementedError("the stand-in speaks no DLPack")


# --- joining, choosing, multiplying ----------------------------------------------------------------------------------


def _on_device(arrays: Any, name: str) -> tuple[ndarray, ...]:
    found = tuple(arrays)
    for one in found:
        if not isinstance(one, ndarray):
            raise TypeError(f"cupy.{name} takes cupy.ndarray, not {type(one)}")
    return found


def concatenate(tup: Any, axis: Any = 0, out: Any = None, *, dtype: Any = None, casting: Any = "same_kind") -> ndarray:
    arrays = _on_device(tup, "concatenate")
    compute = lambda: np.concatenate([one._a for one in arrays], axis, dtype=dtype, casting=casting)  # noqa: E731
    return new_or(arrays, compute, "concatenate", (out,))


def stack(tup: Any, axis: int = 0, out: Any = None, *, dtype: Any = None, casting: Any = "same_kind") -> ndarray:
    arrays = _on_device(tup, "stack")
    return concatenate([expand_dims(one, axis) for one in arrays], axis, out, dtype=dtype, casting=casting)


def expand_dims(a: ndarray, axis: Any) -> ndarray:
    return a._view(np.expand_dims(a._a, axis))


def broadcast_to(array: ndarray, shape: Any) -> ndarray:
    return array._view(np.broadcast_to(array._a, shape))


def where(condition: Any, x: Any = None, y: Any = None) -> Any:
    if x is None:
        return nonzero(condition)
    if not hasattr(condition, "astype"):
        raise AttributeError(f"{type(condition).__name__!r} object has no attribute 'astype'")
    inputs = (operand(condition.astype("?", copy=False)), operand(x), operand(y))
    return new(inputs, lambda: np.where(*map(plain, inputs)), "where")


def repeat(a: ndarray, repeats: Any, axis: Any = None) -> ndarray:
    if isinstance(repeats, (np.ndarray, ndarray)):
        raise TypeError("'repeats' must be an integer or a list here; of an array, CuPy makes the host wait")
    return new((a,), lambda: np.repeat(a._a, repeats, axis), "repeat")


def take(a: ndarray, indices: Any, axis: Any = None, out: Any = None) -> ndarray:
    where = asarray(indices)
    return new_or((a, where), lambda: np.take(a._a, where._a, axis, mode="wrap"), "take", (out,))


def matmul(
    x1: Any,
    x2: Any,
    out: Any = None,
    *,
    casting: Any = "same_kind",
    dtype: Any = None,
    axes: Any = None,
    axis: Any = None,
) -> ndarray:
    a, b = _on_device((x1, x2), "matmul")
    if not a.ndim or not b.ndim:
        raise ValueError("Scalar operands are not allowed, use '*' instead")
    _cublas()
    kind = np.promote_types(a.dtype, b.dtype)
    wide = np.promote_types(kind, np.float32) if kind.kind == "f" else kind  # cuBLAS adds in float32
    compute = lambda: np.matmul(a._a.astype(wide), b._a.astype(wide)).astype(kind)  # noqa: E731
    return new_or((a, b), compute, "matmul", (out,), casting)


def _cublas() -> None:
    from .order import current_stream

    if (stream := current_stream()).captured is not None:
        stream.broken = True
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")


def einsum(*operands: Any, dtype: Any = None, optimize: Any = False) -> ndarray:
    subscripts, *rest = operands
    arrays = _on_device(rest, "einsum")
    if len(arrays) > 1:
        _cublas()  # CuPy may take it there
    return new(arrays, lambda: np.einsum(subscripts, *(one._a for one in arrays), dtype=dtype), "einsum")


METHODS: dict[str, Callable[..., Any]] = {
    "__matmul__": matmul,
    "__rmatmul__": lambda self, other: matmul(other, self),
    "clip": lambda self, min=None, max=None, out=None: clip(self, min, max, out),
    "cumsum": cumsum,
    "dot": matmul,
    "nonzero": nonzero,
    "repeat": repeat,
    "take": take,
}
for _name, _function in METHODS.items():
    setattr(ndarray, _name, _function)

FUNCTIONS: dict[str, Any] = {
    **UFUNCS,
    **{name: _method(name) for name in (*REDUCTIONS, "ravel", "transpose", "swapaxes", "squeeze")},
    "amax": _method("max"),
    "amin": _method("min"),
    "reshape": lambda a, newshape, order="C", *, copy=None: a.reshape(newshape, order=order),
    "array": array,
    "asarray": asarray,
    "asanyarray": asarray,
    "ascontiguousarray": ascontiguousarray,
    "dot": lambda a, b, out=None: matmul(a, b, out),
    "ndim": lambda a: a.ndim,
    "shape": lambda a: a.shape,
    **{
        function.__name__: function
        for function in (
            arange, asnumpy, broadcast_to, clip, concatenate, cumsum, einsum, empty, empty_like, expand_dims,
            from_dlpack, full, full_like, matmul, nan_to_num, nonzero, ones, ones_like, repeat, stack, take, triu,
            where, zeros, zeros_like,
        )
    },
}  # fmt: skip
assert builtins.all(name in CUPY["functions"] or name in CUPY["ufuncs"] for name in FUNCTIONS)
