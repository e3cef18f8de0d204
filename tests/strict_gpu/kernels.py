"""What a launched kernel does here.

By default a kernel does what its docstring says, as array code below, and attention is the reference's: fast enough
for whole programs. A kernel that is not below, or every kernel where STRICT_GPU_KERNELS=trace, runs in the project's
tracer: its own code, thread by thread. With STRICT_GPU_COMPILE=1 each launched kernel is compiled for the GPU too.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from . import memory, order
from .arrays import DTYPES, ndarray, plain
from .modules import Function
from .order import Access, CUDARuntimeError, enqueue

TRACE = os.environ.get("STRICT_GPU_KERNELS") == "trace"
COMPILE = os.environ.get("STRICT_GPU_COMPILE") == "1"

Args = Sequence[Any]  # of a kernel: arrays of the device, and numbers
Index = Sequence[Any] | None  # for each written array: the elements that are written; None: all


def _run(name: str, args: Args, written: Sequence[int], compute: Callable[[], Any], index: Index = None) -> None:
    """Enqueue a kernel that writes the arrays at the positions `written` among its arrays, and reads the others."""
    arrays = [arg for arg in args if isinstance(arg, ndarray)]
    reads = [array.access() for at, array in enumerate(arrays) if at not in written]
    writes = [arrays[at].access(None if index is None else index[n]) for n, at in enumerate(written)]
    enqueue(reads, writes, name, compute)


def rms_norm(name: str, grid: Any, args: Args) -> None:
    out, x, weight, size, eps = map(plain, args)

    def compute() -> None:
        rows = x.reshape(-1, size).astype(np.float32)
        mean = (rows * rows).sum(axis=1, dtype=np.float32, keepdims=True) / np.float32(size)
        out[:] = (rows / np.sqrt(mean + eps) * weight.astype(np.float32)).ravel()

    _run(name, args, [0], compute)


def add_norm(name: str, grid: Any, args: Args) -> None:
    out, x, change, weight, size, eps = map(plain, args)

    def compute() -> None:
        x[:] = x.astype(np.float32) + change.astype(np.float32)
        rows = x.reshape(-1, size).astype(np.float32)
        mean = (rows * rows).sum(axis=1, dtype=np.float32, keepdims=True) / np.float32(size)
        out[:] = (rows / np.sqrt(mean + eps) * weight.astype(np.float32)).ravel()

    _run(name, args, [0, 1], compute)


def turn_and_write(name: str, grid: Any, args: Args) -> None:
    query, key_cache, value_cache, qk, value, cos, sin, slots, *sizes = map(plain, args)
    heads, kv_heads, half, qk_step, value_step, value_first = map(int, sizes)
    tokens, size, bytes_each = grid[0], 2 * half, qk.itemsize
    written = np.flatnonzero(slots >= 0)

    def rows_of(flat: np.ndarray, step: int, num_heads: int) -> np.ndarray:
        strides = (step * bytes_each, size * bytes_each, bytes_each)
        return np.lib.stride_tricks.as_strided(flat, (tokens, num_heads, size), strides).astype(np.float32)

    def compute() -> None:
        rows = rows_of(qk, qk_step, heads + kv_heads)
        turns = [table.reshape(tokens, 1, -1).astype(np.float32) for table in (cos, sin)]
        partner = np.concatenate([rows[..., half:], rows[..., :half]], axis=-1)
        turned = rows * turns[0] + partner * turns[1]
        query[:] = turned[:, :heads].ravel()
        new = (turned[:, heads:], rows_of(value[value_first:], value_step, kv_heads))
        for stored, each in zip((key_cache, value_cache), new, strict=True):
            stored.reshape(-1, kv_heads, size)[slots[written]] = each[written]

    target = (slots[written][:, None].astype(np.int64) * (kv_heads * size) + np.arange(kv_heads * size),)
    _run(name, args, [0, 1, 2], compute, [None, target, target])


def add_part(name: str, grid: Any, args: Args) -> None:
    out, lse, part, part_lse, size = map(plain, args)

    def compute() -> None:
        some = part_lse != -np.inf
        shift = np.maximum(lse[some], part_lse[some])
        weights = np.exp(lse[some] - shift), np.exp(part_lse[some] - shift)
        total = weights[0] + weights[1]
        rows, new = out.reshape(-1, size), part.reshape(-1, size).astype(np.float32)
        rows[some] = (rows[some] * weights[0][:, None] + new[some] * weights[1][:, None]) / total[:, None]
        lse[some] = shift + np.log(total)

    _run(name, args, [0, 1], compute)


def rotate(name: str, grid: Any, args: Args) -> None:
    out, x, cos, sin, heads, half, step = map(plain, args)
    tokens, heads, half, step = grid[0], int(heads), int(half), int(step)
    shape, strides = (tokens, heads, 2 * half), (step * x.itemsize, 2 * half * x.itemsize, x.itemsize)

    def compute() -> None:
        rows = np.lib.stride_tricks.as_strided(x, shape, strides).astype(np.float32)
        turns = [table.reshape(tokens, 1, -1).astype(np.float32) for table in (cos, sin)]
        partner = np.concatenate([rows[..., half:], rows[..., :half]], axis=-1)
        out[:] = (rows * turns[0] + partner * turns[1]).ravel()

    _run(name, args, [0], compute)


def gated(name: str, grid: Any, args: Args) -> None:
    out, gate_up, size = map(plain, args)

    def compute() -> None:
        gate, up = gate_up.reshape(-1, 2, int(size)).astype(np.float32).swapaxes(0, 1)
        out[:] = (gate / (1 + np.exp(-gate)) * up).ravel()

    _run(name, args, [0], compute)


def copy_blocks(name: str, grid: Any, args: Args) -> None:
    cache, pairs, block_words, plane_words = map(plain, args)
    planes = np.arange(grid[1])[:, None, None] * plane_words
    # [plane, pair, word] of the sources and of the destinations
    source, target = (planes + pairs[which::2, None] * block_words + np.arange(block_words) for which in (0, 1))

    def compute() -> None:
        cache[target] = cache[source]

    on_device = args[0].access
    enqueue([on_device((source,)), args[1].access()], [on_device((target,))], name, compute)


def move_rows(name: str, grid: Any, args: Args) -> None:
    key, value, key_cache, value_cache, slots, row, key_step, value_step = map(plain, args)
    tokens = np.flatnonzero(slots >= 0)[:, None]
    target = slots[tokens] * row + np.arange(row)

    def compute() -> None:
        key_cache[target] = key[tokens * key_step + np.arange(row)]
        value_cache[target] = value[tokens * value_step + np.arange(row)]

    _run(name, args, [2, 3], compute, [(target,), (target,)])


def write_rows(name: str, grid: Any, args: Args) -> None:
    from paged_ref.extras.formats import encode

    rows, cache, slots, scales, heads, size, block, *steps = map(plain, args)
    row, row_head, row_dim, block_step, slot_step, head_step, dim_step = map(int, steps)
    tokens = np.flatnonzero(slots >= 0)[:, None, None]
    head, dim, slot = np.arange(heads)[:, None], np.arange(size), slots[tokens].astype(np.int64)
    target = slot // block * block_step + slot % block * slot_step + head * head_step + dim * dim_step
    scaled = cache.dtype in (np.int8, np.uint8)

    def compute() -> None:
        numbers = rows[tokens * row + head * row_head + dim * row_dim]
        cache[target] = encode(numbers, cache.dtype, scales if scaled else None)

    _run(name, args, [1], compute, [(target,)])


def by_the_reference(name: str, grid: Any, args: Args) -> None:
    """`attending` computes what the attention kernels do, from the whole call."""
    order.work[name] += 1


MEANING: dict[str, Callable[[str, Any, Args], None]] = {
    "rms_norm_kernel": rms_norm,
    "add_norm_kernel": add_norm,
    "turn_and_write_kernel": turn_and_write,
    "add_part_kernel": add_part,
    "rotate_kernel": rotate,
    "gated_kernel": gated,
    "copy_blocks_kernel": copy_blocks,
    "move_rows_kernel": move_rows,
    "kernel": write_rows,
    "flash_attention": by_the_reference,
    "flash_combine": by_the_reference,
    "attention_kernel": by_the_reference,
}


def start(kernel: Any, grid: tuple[int, int], num_threads: int, args: Args) -> None:
    """Run a kernel on the current stream."""
    name = kernel.py_func.__name__
    if TRACE or name not in MEANING:
        traced(kernel, grid, num_threads, args)
        return
    with np.errstate(all="ignore"):
        MEANING[name](name, grid, args)


def traced(kernel: Any, grid: tuple[int, int], num_threads: int, args: Args) -> None:
    """Run the kernel's own code, and check the accesses that the tracer records."""
    from paged_ref.tracer import trace

    arrays = [arg for arg in args if isinstance(arg, ndarray)]
    record: Any = None

    def run() -> None:
        nonlocal record
        record = trace.run(kernel, grid, num_threads, *map(plain, args))

    def touched(write: bool) -> list[Access]:
        found = []
        for number, array in enumerate(arrays):
            elements = np.unique(record.index[(record.array == number) & (record.write == write)])
            if elements.size:
                found.append(array.access(np.unravel_index(elements, array.shape)))
        return found

    enqueue(lambda: touched(False), lambda: touched(True), kernel.py_func.__name__, run)


# --- attention, from the whole call ----------------------------------------------------------------------------------


def on_host(value: Any) -> Any:
    """A dataclass with the NumPy arrays behind its arrays of the device."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return dataclasses.replace(value, **{field.name: on_host(getattr(value, field.name)) for field in fields})
    return plain(value)


def attending(launch: Callable[[Any], None]) -> Callable[[Any], None]:
    """`attend(call)` of a backend: its kernels are launched for their checks, and the reference computes."""

    def attend(call: Any) -> None:
        launch(call)
        if TRACE:
            return
        from paged_ref.extras import variants

        host = on_host(call)
        addresses = call.addresses
        small = (addresses.seq_lens, addresses.query_start_loc, addresses.block_tables, addresses.starts)
        out = [array.access() for array in (call.out, call.lse) if array is not None]

        def run() -> None:
            with np.errstate(all="ignore"):
                variants.attend(host)

        def reads() -> list[Access]:
            used = (np.array(_used(host.addresses, host.keys.shape)),)
            blocks = [cache.access(used) for cache in (call.keys, call.values)] if used[0].size else []
            return [*blocks, call.query.access(), *(array.access() for array in small if array is not None)]

        enqueue(reads, out, "attention by the reference", run)
        order.work["attention by the reference"] -= 1  # the kernels are counted

    return attend


def _used(addresses: Any, shape: tuple[int, ...]) -> list[int]:
    """The blocks, or the slots, that attention reads."""
    used: set[int] = set()
    for s, length in enumerate(addresses.seq_lens.tolist()):
        if addresses.block_tables is not None:
            used.update(addresses.block_tables[s, : -(-length // shape[1])].tolist())
        else:
            used.update(range(int(addresses.starts[s]), int(addresses.starts[s]) + length))
    return sorted(used)


# --- in place of the compilers and of Numba's launch -----------------------------------------------------------------


def loading(loaded: Callable[..., Any]) -> Callable[..., Any]:
    """`loaded` of launching.py: the launched kernel runs here. `loaded` itself compiles it for the GPU."""

    @cache
    def function(kernel: Any, types: Any, bounds: Any, number: int) -> Function:
        from paged_ref.tuned.machine_code import parameters

        if COMPILE:
            loaded(kernel, types, bounds, number)
        name = kernel.py_func.__name__

        def run(grid: Any, block: Any, args: Args) -> None:
            if (given := parameters(tuple(args))) != types:
                raise AssertionError(f"{name} was compiled for {types} and is launched with {given}")
            if block[0] > bounds[0]:
                raise CUDARuntimeError(f"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: {name}: {block} threads, bounds {bounds}")
            start(kernel, grid[:2], block[0], args)

        return Function(run)

    return function


class NumbaStream:
    def __init__(self, ptr: int) -> None:
        if type(ptr) is not int:
            raise TypeError("ptr for external stream must be an int")
        self.ptr = ptr


def as_cuda_array(obj: Any, sync: bool = True) -> Any:
    """numba.cuda.as_cuda_array. With `sync` the host would wait for the array's stream."""
    if sync:
        order.note_wait("as_cuda_array")
    if np.dtype(obj.__cuda_array_interface__["typestr"]) not in DTYPES:
        raise TypeError(obj.dtype)
    return obj


def configured(kernel: Any, configuration: tuple[Any, int, NumbaStream]) -> Callable[..., None]:
    """`kernel[grid, num_threads, stream]`."""
    grid, num_threads, stream = configuration

    def launch(*args: Any) -> None:
        if stream.ptr != order.current_stream().ptr:
            raise AssertionError("the kernel is not on CuPy's current stream")
        start(kernel, grid, num_threads, args)

    return launch


def put_in_place() -> None:
    """The project's kernels run here from now on. Import paged_ref before."""
    from paged_ref.tuned import copies, launching, machine_code

    # First what other modules take by name when they are imported.
    launching.loaded = loading(launching.loaded)  # type: ignore[assignment]
    if not COMPILE:
        machine_code.compile_kernel = lambda *what: machine_code.Code("", "", b"", 0, 0, 0, 0, 0)  # type: ignore[assignment]
    make_pinned = copies.pinned
    copies.pinned = lambda *args, **options: make_pinned(*args, **options).view(memory.Pinned)

    from numba import cuda

    from paged_ref.core.attention import cuda as teaching
    from paged_ref.core.attention import naive
    from paged_ref.tuned import flash

    for backend in (flash, teaching):
        setattr(backend, "attend", attending(getattr(backend, "attend")))  # noqa: B009, B010
    cuda.external_stream, cuda.as_cuda_array = NumbaStream, as_cuda_array
    type(naive.attention_kernel).__getitem__ = configured
