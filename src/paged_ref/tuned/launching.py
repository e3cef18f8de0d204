"""Launching a compiled kernel on CuPy arrays with as little host work as CuPy can: pointers and scalars only.

Numba's own launch describes each array to the kernel by eight numbers or more, and takes tens of microseconds; a
decode step has hundreds of launches. What is loaded is what machine_code.py compiles, so nothing differs from what
the tests read.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

from ..core import device
from ..core.attention.cuda import Launch


@cache
def unavailable() -> str | None:
    """Why no kernel can be launched so on this machine; None where it can."""
    if not device.on_gpu:
        return device.reason
    for module, package in (("numba_cuda", "numba-cuda"), ("cuda.bindings", "cuda-bindings")):
        if importlib.util.find_spec(module) is None:
            return f"it needs the package {package}"
    return None


def start(launch: Launch) -> None:
    """Launch on CuPy's current stream: arrays go as the address of their first element, NumPy scalars by value.

    The host waits for nothing. The first launch of a kernel on a GPU compiles it.
    """
    kernel, grid, num_threads, args = launch
    if 0 in grid:
        return
    from .machine_code import bounds_of, parameters

    number = int(device.xp.cuda.Device().id)
    loaded(kernel, parameters(args), bounds_of(launch), number)((*grid, 1), (num_threads, 1, 1), args)


@cache
def loaded(kernel: Any, types: tuple[str, ...], bounds: tuple[int, int], number: int) -> Any:
    """The compiled kernel on GPU `number`, which must be the current one: a CuPy function."""
    from .machine_code import compile_kernel

    code = compile_kernel(kernel, types, bounds, capability(number))
    module = device.xp.cuda.Module()
    module.load(code.binary)
    return module.get_function(code.name)


@cache
def properties(number: int) -> dict[str, Any]:
    """What CUDA says of GPU `number`."""
    return dict(device.xp.cuda.runtime.getDeviceProperties(number))


def capability(number: int) -> tuple[int, int]:
    """The compute capability of GPU `number`."""
    return int(properties(number)["major"]), int(properties(number)["minor"])
