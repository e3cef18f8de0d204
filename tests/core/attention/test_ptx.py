"""The teaching kernels, compiled without a GPU: what their machine code must and must not contain."""

from __future__ import annotations

import difflib
import inspect
import re
from functools import cache
from typing import Any

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda compiles the kernels (extra test, cuda12 or cuda13)")

from numba import cuda, types

from paged_ref.core.attention import naive, paged
from paged_ref.core.attention.cuda import prepare_compiler

COMPUTE = [(7, 5), (8, 0), (9, 0)]
DTYPES = ["float32", "float16"]


@cache
def compiled(name: str, dtype: str, cc: tuple[int, int], layout: str = "C") -> str:
    """The PTX of a kernel for arrays of this dtype; layout A stands for strided views."""
    number = getattr(types, dtype)
    lengths = types.Array(types.int32, 1, "C")
    cache_type = types.Array(number, 3, layout)
    where = (lengths,) if name == "naive" else (types.Array(types.int32, 2, layout), types.int64)
    signature = (
        types.Array(number, 3, layout), types.Array(types.float32, 2, "C"), types.Array(number, 3, layout),
        cache_type, cache_type, *where, lengths, lengths, types.float32,
    )  # fmt: skip
    kernel = {"naive": naive, "paged": paged}[name].attention_kernel
    prepare_compiler()
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=cc)
    return str(ptx)


def operations(ptx: str) -> list[str]:
    """The operation of each instruction: `fma.rn.f32` and so on."""
    return re.findall(r"^\s+(?:@!?%p\d+\s+)?([a-z][\w.]*)\s", ptx, flags=re.MULTILINE)


# Each kernel is compiled in about a second; these are each kernel, dtype and architecture twice.
CHOSEN = {
    ("naive", "float32", (7, 5)),
    ("paged", "float16", (7, 5)),
    ("paged", "float32", (9, 0)),
    ("naive", "float16", (9, 0)),
}
KERNELS = [
    pytest.param(
        name,
        dtype,
        cc,
        id=f"{name}-{dtype}-sm_{cc[0]}{cc[1]}",
        marks=[] if cc == (8, 0) or (name, dtype, cc) in CHOSEN else pytest.mark.slow,
    )
    for name in ("naive", "paged")
    for dtype in DTYPES
    for cc in COMPUTE
]


@pytest.mark.parametrize(("name", "dtype", "cc"), KERNELS)
def test_no_float64_no_local_memory_no_call(name: str, dtype: str, cc: tuple[int, int]) -> None:
    ptx = compiled(name, dtype, cc)
    assert f".target sm_{cc[0]}{cc[1]}" in ptx
    assert ".f64" not in ptx, "a Python float or float64 math slipped into the kernel"
    assert ".local" not in ptx, "an array or a spill went to local memory"
    assert "call" not in operations(ptx), "something was not inlined"


@pytest.mark.parametrize("name", ["naive", "paged"])
def test_strided_views_compile_as_well(name: str) -> None:
    ptx = compiled(name, "float16", (8, 0), "A")
    assert ".f64" not in ptx
    assert ".local" not in ptx


@pytest.mark.parametrize("name", ["naive", "paged"])
def test_the_inner_loops_divide_nothing(name: str) -> None:
    """The loops over a key's elements and over a tile's values: loads and fused multiply-adds."""
    ptx = compiled(name, "float32", (8, 0))
    parts = re.split(r"^(\$L__BB\w+):", ptx, flags=re.MULTILINE)
    loops = [
        operations(body)
        for label, body in zip(parts[1::2], parts[2::2], strict=True)
        if re.search(rf"bra(\.uni)?\s+{re.escape(label)};", body)  # it jumps back to its own beginning
    ]
    loops = [loop for loop in loops if any(operation.startswith("fma") for operation in loop)]
    assert len(loops) >= 2
    for loop in loops:
        assert not [operation for operation in loop if operation.startswith(("div", "rem"))]


def test_the_table_costs_one_division_and_one_remainder_for_each_key() -> None:
    """`slot_of` stands in the kernel once, before the loop over the key's elements."""
    plain, tabled = (operations(compiled(name, "float32", (8, 0))) for name in ("naive", "paged"))
    assert tabled.count("div.s64") - plain.count("div.s64") == 1
    assert tabled.count("rem.s64") - plain.count("rem.s64") == 1


def test_barriers_are_the_same() -> None:
    plain, tabled = (operations(compiled(name, "float32", (8, 0))) for name in ("naive", "paged"))
    assert plain.count("bar.sync") == tabled.count("bar.sync") == 7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["naive", "paged"])
def test_machine_code_spills_nothing(name: str, dtype: str) -> None:
    """nvJitLink makes the code that a GPU runs, and says how many registers it takes."""
    nvjitlink = pytest.importorskip("cuda.bindings.nvjitlink", reason="cuda-bindings links PTX to machine code")
    ptx = compiled(name, dtype, (8, 0)).encode()
    try:
        linker: Any = nvjitlink.create(3, ["-arch=sm_80", "-Xptxas=-v", "-verbose"])
    except Exception as error:  # the library itself is a wheel of its own
        pytest.skip(f"no nvJitLink here: {error}")
    nvjitlink.add_data(linker, nvjitlink.InputType.PTX, ptx, len(ptx), name)
    nvjitlink.complete(linker)
    log = bytearray(nvjitlink.get_info_log_size(linker))
    nvjitlink.get_info_log(linker, log)
    nvjitlink.destroy(linker)
    text = log.decode()
    found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.search(r"[Uu]sed (\d+) registers", text)
    assert found, text
    assert registers, text
    assert found.groups() == ("0", "0", "0")
    assert int(registers[1]) <= 96  # five CUDA blocks of 128 threads fit on a multiprocessor


def test_the_two_kernels_differ_only_where_the_table_enters() -> None:
    """The diff of the two functions is the lesson: each line of it is about the table."""
    plain, tabled = (inspect.getsource(module.attention_kernel.py_func).splitlines() for module in (naive, paged))
    diff = [line for line in difflib.ndiff(plain, tabled) if line[0] in "+-"]
    assert [line.split("#")[0].split() for line in diff if "[" not in line or "=" in line] == [
        ["-", "starts,"],
        ["+", "block_tables,", "block_size,"],
        ["-", "slot", "=", "starts[seq]", "+", "position"],
        ["+", "slot", "=", "slot_of(block_tables[seq],", "position,", "block_size)"],
    ]
    assert len(diff) == 6  # and one line of the docstring in each
