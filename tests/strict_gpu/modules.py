"""The modules `cupy`, `cupy.cuda`, `cupy.random` and `cupyx`, and one GPU that says it is an H200."""

from __future__ import annotations

import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

from . import memory, order
from .arrays import CUPY, SCALARS, missing, ndarray, new
from .functions import FUNCTIONS
from .order import CUDARuntimeError


class StandInModule(ModuleType):
    """Has `contents`; another name raises NotImplementedError if CuPy has it, else AttributeError."""

    def __init__(self, name: str, known: Any, contents: dict[str, Any]) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__path__: list[str] = []
        self._known = set(known)
        wrong = set(contents) - self._known
        assert not wrong, f"{name} of CuPy has no {sorted(wrong)}"
        self.__dict__.update(contents)

    def __getattr__(self, name: str) -> Any:
        raise missing(self.__name__, name, self.__dict__.get("_known", ()))


# --- cupy.cuda -----------------------------------------------------------------------------------------------------

MEMORY = (140 << 30, 141 << 30)  # bytes of the GPU: free, all


class Device:
    mem_info = MEMORY

    def __init__(self, device: Any = None) -> None:
        self.id = 0 if device is None else int(device)

    def __int__(self) -> int:
        return self.id

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *args: object) -> None: ...

    def use(self) -> None: ...

    def synchronize(self) -> None:
        order.synchronize_device()


def properties(device: int) -> dict[str, Any]:
    """As CUDA 13 says them: without clock rates."""
    if device != 0:
        raise CUDARuntimeError("cudaErrorInvalidDevice")
    return {
        "name": b"Stand-in for an H200", "totalGlobalMem": MEMORY[1], "multiProcessorCount": 132, "major": 9,
        "minor": 0, "l2CacheSize": 62914560, "memoryBusWidth": 6144, "warpSize": 32,
        "sharedMemPerMultiprocessor": 233472, "sharedMemPerBlockOptin": 232448, "maxThreadsPerBlock": 1024,
        "regsPerMultiprocessor": 65536,
    }  # fmt: skip


def memcpy_2d_async(*args: Any) -> None:
    for value in args:
        if not isinstance(value, int):
            raise TypeError(f"an integer is required, not {type(value)}")
    dst, dpitch, src, spitch, width, height, kind, stream = args
    memory.copy_2d(dst, dpitch, src, spitch, width, height, kind, order.streams[stream])


def memcpy_async(dst: int, src: int, size: int, kind: int, stream: int) -> None:
    memcpy_2d_async(dst, size, src, size, size, 1, kind, stream)


def elapsed(start: order.Event, end: order.Event) -> float:
    """Milliseconds. There is no clock here: any positive number."""
    if not (start.timing and end.timing):
        raise CUDARuntimeError("cudaErrorInvalidResourceHandle: timing is disabled for this event")
    return 300.0


class Module:
    """Machine code that is loaded, and not run."""

    def load(self, cubin: bytes) -> None:
        if type(cubin) is not bytes:
            raise TypeError("Argument 'cubin' has incorrect type (expected bytes)")

    def get_function(self, name: str) -> None: ...


class Function:
    """A compiled kernel. A launch is checked as CuPy and the driver check it, and then run(grid, block, args) is."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def __call__(self, grid: Any, block: Any, args: Any, shared_mem: int = 0, stream: Any = None) -> None:
        if not isinstance(grid, tuple) or not isinstance(block, tuple):
            raise TypeError("grid and block must be tuples")
        grid, block = (tuple(max(1, int(n)) for n in (*sizes, 1, 1)[:3]) for sizes in (grid, block))
        if grid[0] > 2**31 - 1 or max(grid[1:]) > 65535 or math.prod(block) > 1024:
            raise CUDARuntimeError(f"CUDA_ERROR_INVALID_VALUE: grid {grid}, block {block}")
        for arg in args:
            if not isinstance(arg, (ndarray, *SCALARS)):
                raise TypeError(f"{type(arg)} cannot be a parameter of a kernel")
        self._run(grid, block, args)


class PinnedMemory:
    """Page-locked memory of exactly this size."""

    def __init__(self, size: int, flags: int = 0) -> None:
        self.allocation = memory.Allocation(size, on_host=True)
        self.ptr, self.size = self.allocation.ptr, size


def pinned_pointer(mem: PinnedMemory, offset: int) -> np.ndarray:
    """cupy.cuda.PinnedMemoryPointer: here the bytes themselves, which `np.frombuffer` takes."""
    return mem.allocation.bytes[offset:]


RUNTIME = StandInModule(
    "cupy.cuda.runtime",
    [*CUPY["runtime"], *CUPY["runtime functions"]],
    {
        **CUPY["runtime"],
        "CUDARuntimeError": CUDARuntimeError,
        "driverGetVersion": lambda: 13000,
        "runtimeGetVersion": lambda: 13000,
        "getDeviceCount": lambda: 1,
        "getDevice": lambda: 0,
        "getDeviceProperties": properties,
        "deviceSynchronize": order.synchronize_device,
        "memcpyAsync": memcpy_async,
        "memcpy2DAsync": memcpy_2d_async,
    },
)
CUDA = StandInModule(
    "cupy.cuda",
    CUPY["cuda"],
    {
        "Device": Device,
        "Event": order.Event,
        "Function": Function,
        "Graph": order.Graph,
        "MemoryHook": memory.MemoryHook,
        "MemoryPointer": memory.MemoryPointer,
        "MemoryPool": memory.MemoryPool,
        "Module": Module,
        "PinnedMemory": PinnedMemory,
        "PinnedMemoryPointer": pinned_pointer,
        "Stream": order.Stream,
        "get_current_stream": order.current_stream,
        "get_elapsed_time": elapsed,
        "is_available": lambda: True,
        "runtime": RUNTIME,
        "set_allocator": memory.set_allocator,
    },
)


# --- cupy.random: NumPy's numbers; cuRAND's are others ---------------------------------------------------------------


class Generator:
    def __init__(self, seed: Any = None) -> None:
        self._random = np.random.default_rng(seed)

    def _given(self, numbers: Any) -> ndarray:
        order.refuse_in_capture("calls of cuRAND")
        return new((), lambda: numbers, "random")

    def standard_normal(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> ndarray:
        return self._given(self._random.standard_normal(size, dtype))

    def random(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> ndarray:
        return self._given(self._random.random(size, dtype))

    def integers(
        self, low: Any, high: Any = None, size: Any = None, dtype: Any = np.int64, endpoint: bool = False
    ) -> ndarray:
        return self._given(self._random.integers(low, high, size, dtype, endpoint))


_common = Generator(0)
RANDOM = StandInModule(
    "cupy.random",
    CUPY["random"],
    {
        "Generator": Generator,
        "default_rng": Generator,
        "permutation": lambda a: _common._given(_common._random.permutation(int(a))),
        "rand": lambda *size, dtype=np.float64: _common.random(size, dtype),
        "random": lambda size=None, dtype=np.float64: _common.random(size, dtype),
        "standard_normal": lambda size=None, dtype=np.float64: _common.standard_normal(size, dtype),
    },
)

NUMPYS = (
    "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool_",
    "dtype", "newaxis", "nan", "inf", "pi", "e", "iinfo", "finfo", "result_type", "promote_types",
)  # fmt: skip
CUPY_MODULE = StandInModule(
    "cupy",
    ["__version__", *CUPY["functions"], *CUPY["ufuncs"], *CUPY["others"]],
    {
        **{name: getattr(np, name) for name in NUMPYS},
        **FUNCTIONS,
        "__version__": CUPY["version"],
        "cuda": CUDA,
        "get_default_memory_pool": lambda: memory.pool,
        "ndarray": ndarray,
        "random": RANDOM,
    },
)
CUPYX = StandInModule("cupyx", CUPY["cupyx"], {"empty_pinned": memory.empty_pinned})


def put_in_place() -> None:
    """`import cupy` gives the stand-in from now on."""
    for module in (CUPY_MODULE, CUDA, RUNTIME, RANDOM, CUPYX):
        sys.modules[module.__name__] = module
