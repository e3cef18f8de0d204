"""Launching a compiled kernel on CuPy arrays with as little host work as CuPy can: pointers and scalars only.

Numba's own launch describes each array to the kernel by eight numbers or more, and takes tens of microseconds; a
decode step has hundreds of launches (`paged-ref bench host`). What is loaded is what machine_code.py compiles, so
nothing differs from what the tests read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from ..core import device
from ..core.attention.cuda import Launch
from ..core.device import Array, module_of
from . import cubins
from .machine_code import Parameters, bounds_of, compiler_fault, parameters

Start = Callable[[tuple[int, int, int], tuple[int, int, int], tuple[Any, ...]], object]  # grid, CUDA block, arguments
_host: Callable[[Any], Start] | None = None  # what takes the GPU's place inside `on_host`


def unavailable() -> str | None:
    """Why no kernel can be launched so on this machine; None where it can. The first call compiles a small kernel."""
    return _fault() if _host is None else None


@cache
def _fault() -> str | None:
    if not device.on_gpu:
        return device.reason
    for module, package in (("numba_cuda", "numba-cuda"), ("cuda.bindings", "cuda-bindings")):
        if importlib.util.find_spec(module) is None:
            return f"it needs the package {package}"
    return compiler_fault(capability(current_device()))


@contextmanager
def on_host(run: Callable[[Any], Start]) -> Iterator[None]:
    """Inside, launches take NumPy arrays, and `run(kernel)` gives what starts a kernel in the place of a GPU: what
    tests and benchmarks use on machines without one."""
    from . import register_backends

    def put(value: Callable[[Any], Start] | None) -> None:
        global _host
        _host = value
        _started.cache_clear()
        register_backends()

    before = _host
    put(run)
    try:
        yield
    finally:
        put(before)


def takes(array: Array) -> bool:
    """True where kernels can read this array."""
    return module_of(array) is not np or _host is not None


def start(launch: Launch, types: Parameters | None = None) -> None:
    """Launch on CuPy's current stream: arrays go as the address of their first element, NumPy scalars by value.

    `types` are the arguments' types, where the caller knows them already. The host waits for nothing. The first launch
    of a kernel on a GPU compiles it.
    """
    kernel, grid, num_threads, args = launch
    if 0 in grid:
        return
    run = _started(kernel, types or parameters(args), bounds_of(launch), current_device())
    run((*grid, 1), (num_threads, 1, 1), args)


@cache
def _started(kernel: Any, types: Parameters, bounds: tuple[int, int], number: int) -> Start:
    if _host is not None:
        return _host(kernel)
    found: Start = loaded(kernel, types, bounds, number)
    return found


@cache
def loaded(kernel: Any, types: Parameters, bounds: tuple[int, int], number: int) -> Any:
    """The compiled kernel on GPU `number`, which must be the current one: a CuPy function."""
    name, binary = cubins.code_of(kernel, types, bounds, capability(number))
    module = device.xp.cuda.Module()
    module.load(binary)
    return module.get_function(name)


def current_device() -> int:
    """The number of CuPy's current GPU; 0 where there is none."""
    return int(device.xp.cuda.Device().id) if device.on_gpu else 0


def processors() -> int:
    """Multiprocessors of the current GPU."""
    return int(properties(current_device())["multiProcessorCount"])


@cache
def properties(number: int) -> dict[str, Any]:
    """What CUDA says of GPU `number`; where there is none, of an H200."""
    if not device.on_gpu:
        return {"major": 9, "minor": 0, "multiProcessorCount": 132}
    return dict(device.xp.cuda.runtime.getDeviceProperties(number))


def capability(number: int) -> tuple[int, int]:
    """The compute capability of GPU `number`."""
    return int(properties(number)["major"]), int(properties(number)["minor"])
