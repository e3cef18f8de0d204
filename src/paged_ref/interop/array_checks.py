"""What the public kernel functions check of arrays, in the same words."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..core.device import Array, to_host
from ..extras.formats import BFLOAT16, FLOAT8, INT8, MAX_VALUE, format_name
from .dlpack import adopt

FLOATS = (*(np.dtype(name) for name in ("float16", "float32", "float64")), BFLOAT16)
CACHES = (*FLOATS, INT8, FLOAT8)
INTEGERS = tuple(np.dtype(name) for name in ("int32", "int64"))


class Kind(NamedTuple):
    """What is checked of an array before its values: it can be hashed, so what was found right can be remembered.
    The functions below take a kind or an array, unless they say otherwise."""

    library: Any  # NumPy or CuPy
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def scales_of(cache: Array, name: str, key_scales: Any, value_scales: Any) -> tuple[Array | None, Array | None]:
    """The scales of K and V, checked, as float32 [num_kv_heads]; None where the cache has none. Takes arrays."""
    key = None if key_scales is None else adopt(key_scales, "key_scales")
    value = None if value_scales is None else adopt(value_scales, "value_scales")
    require_scales(cache, name, key, value)
    return as_float32(key), as_float32(value)


def require_scales(
    cache: Array | Kind, name: str, key_scales: Array | Kind | None, value_scales: Array | Kind | None
) -> None:
    """Caches of int8 and float8 need scales [num_kv_heads]; the others have none."""
    scales, num_kv_heads = {"key_scales": key_scales, "value_scales": value_scales}, cache.shape[-2]
    for scales_name, given in scales.items():
        if cache.dtype in MAX_VALUE and given is None:
            raise ValueError(
                f"{name} is {format_name(cache.dtype)}; {scales_name} [{num_kv_heads}] is needed, one for each KV head"
            )
        if cache.dtype not in MAX_VALUE and given is not None:
            raise ValueError(
                f"{scales_name} is given; {name} is {format_name(cache.dtype)}, and only int8 and float8 have scales"
            )
    for scales_name, given in scales.items():
        require_per_head(given, scales_name, num_kv_heads, "KV head")


def check_scales(key_scales: Array | None, value_scales: Array | None) -> None:
    """Looks at values of arrays: not for arrays on a GPU, unless asked to."""
    for scales, name in ((key_scales, "key_scales"), (value_scales, "value_scales")):
        scales = None if scales is None else to_host(scales)
        if scales is not None and not (np.isfinite(scales) & (scales > 0)).all():
            head = int(np.argmin(np.isfinite(scales) & (scales > 0)))
            raise ValueError(f"{name}[{head}] is {scales[head]}; a positive number is needed")


def as_float32(numbers: Array | None) -> Array | None:
    return None if numbers is None else numbers.astype(np.float32, copy=False)


def require_per_head(values: Array | Kind | None, name: str, num_heads: int, what: str = "head") -> None:
    if values is not None:
        require_shape(values.shape == (num_heads,), name, values, f"[{num_heads}], one for each {what}")


def described(array: Array) -> str:
    return f"{format_name(array.dtype)}{list(array.shape)}"


def require_shape(ok: bool, name: str, array: Array, shape: str) -> None:
    if not ok:
        raise ValueError(f"{name} has shape {list(array.shape)}; {shape} is needed")


def require_dtype(array: Array, name: str, known: tuple[np.dtype[Any], ...]) -> None:
    if array.dtype not in known:
        words = (
            f"{dtype} ({format_name(dtype)})" if format_name(dtype) != dtype.name else dtype.name for dtype in known
        )
        raise ValueError(f"{name} is {array.dtype}; known are {', '.join(words)}")
