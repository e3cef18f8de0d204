"""What the public kernel functions check of arrays, in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..core.device import Array, to_host
from ..extras.formats import BFLOAT16, FLOAT8, INT8, MAX_VALUE, format_name

FLOATS = (*(np.dtype(name) for name in ("float16", "float32", "float64")), BFLOAT16)
CACHES = (*FLOATS, INT8, FLOAT8)
INTEGERS = tuple(np.dtype(name) for name in ("int32", "int64"))


class Kind(NamedTuple):
    """What is known of an array without its values. Kinds can be hashed, so what was found of one can be remembered.

    The functions below take a kind in place of an array, unless they look at values.
    """

    name: str  # the caller's
    type: type[Any]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def library(self) -> str:
        return "numpy" if issubclass(self.type, np.ndarray) else "cupy"


def require_scales(cache: Array, name: str, given: Mapping[str, Array]) -> None:
    """Caches of int8 and float8 need `key_scales` and `value_scales`, [num_kv_heads]; the others have none."""
    num_kv_heads, kept = cache.shape[-2], format_name(cache.dtype)
    for scales in ("key_scales", "value_scales"):
        if cache.dtype in MAX_VALUE and scales not in given:
            raise ValueError(f"{name} is {kept}; {scales} [{num_kv_heads}] is needed, one for each KV head")
        if cache.dtype not in MAX_VALUE and scales in given:
            raise ValueError(f"{scales} is given; {name} is {kept}, and only int8 and float8 have scales")
        require_per_head(given, scales, num_kv_heads, "KV head")


def require_per_head(given: Mapping[str, Array], name: str, num_heads: int, head: str) -> None:
    if name in given:
        require_shape(given[name].shape == (num_heads,), name, given[name], f"[{num_heads}], one for each {head}")


def check_scales(key_scales: Array | None, value_scales: Array | None) -> None:
    """Looks at values: not for arrays on a GPU, unless asked to."""
    for scales, name in ((key_scales, "key_scales"), (value_scales, "value_scales")):
        scales = None if scales is None else to_host(scales)
        if scales is not None and not (np.isfinite(scales) & (scales > 0)).all():
            head = int(np.argmin(np.isfinite(scales) & (scales > 0)))
            raise ValueError(f"{name}[{head}] is {scales[head]}; a positive number is needed")


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
