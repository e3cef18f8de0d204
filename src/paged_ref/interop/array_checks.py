"""What the public kernel functions check of arrays, in the same words."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.device import Array, to_host
from ..extras.formats import BFLOAT16, FLOAT8, INT8, MAX_VALUE, format_name
from .dlpack import adopt

FLOATS = (*(np.dtype(name) for name in ("float16", "float32", "float64")), BFLOAT16)
CACHES = (*FLOATS, INT8, FLOAT8)
INTEGERS = tuple(np.dtype(name) for name in ("int32", "int64"))


def scales_of(
    dtype: np.dtype[Any], name: str, num_kv_heads: int, key_scales: Any, value_scales: Any
) -> tuple[Array | None, Array | None]:
    """The scales of K and V as float32 [num_kv_heads], for the caches that need them, and None for the others."""
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    for scales_name, given in scales.items():
        if dtype in MAX_VALUE and given is None:
            raise ValueError(
                f"{name} is {format_name(dtype)}; {scales_name} [{num_kv_heads}] is needed, one for each KV head"
            )
        if dtype not in MAX_VALUE and given is not None:
            raise ValueError(
                f"{scales_name} is given; {name} is {format_name(dtype)}, and only int8 and float8 have scales"
            )
    key, value = (per_head(given, name, num_kv_heads, "KV head") for name, given in scales.items())
    return key, value


def check_scales(key_scales: Array | None, value_scales: Array | None) -> None:
    """Looks at values: not for arrays on a GPU, unless asked to."""
    for scales, name in ((key_scales, "key_scales"), (value_scales, "value_scales")):
        scales = None if scales is None else to_host(scales)
        if scales is not None and not (np.isfinite(scales) & (scales > 0)).all():
            head = int(np.argmin(np.isfinite(scales) & (scales > 0)))
            raise ValueError(f"{name}[{head}] is {scales[head]}; a positive number is needed")


def per_head(values: Any, name: str, num_heads: int, what: str = "head") -> Array | None:
    if values is None:
        return None
    values = adopt(values, name)
    require_shape(values.shape == (num_heads,), name, values, f"[{num_heads}], one for each {what}")
    return values.astype(np.float32, copy=False)


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
