"""The tuned kernels' machine code, made without a GPU: what it must and must not contain, and what it costs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda compiles the kernels (extra test, cuda12 or cuda13)")
pytest.importorskip("cuda.bindings.nvjitlink", reason="cuda-bindings links PTX to machine code (extra `ptx`)")

from paged_ref.bench import sass
from paged_ref.cli import main
from paged_ref.tuned.flash_combine import combine_kernel
from paged_ref.tuned.flash_elements import ELEMENTS
from paged_ref.tuned.flash_kernels import attention_kernel
from paged_ref.tuned.flash_variant import NUM_THREADS, KernelVariant
from paged_ref.tuned.machine_code import (
    Code,
    compile_kernel,
    disassemble,
    disassembler,
    loop_with_most,
    operation,
)

try:
    from cuda.bindings import nvjitlink

    nvjitlink.version()
except Exception as error:  # the library itself is a wheel of its own
    pytest.skip(f"no nvJitLink here: {error}", allow_module_level=True)

needs_disassembler = pytest.mark.skipif(disassembler() is None, reason="nvdisasm is not here (extra `ptx`)")

GROUP_OF_8 = "Llama-3-70B/8 8/1"  # differs from groups of 4 in a number alone, and is left to the slow tests
# What is compiled in a test: each takes seconds. `paged-ref bench sass` has all of them, for both.
CHOSEN = {
    (8, 0): ["Llama-3-8B 32/8", "- float32", "- float8"],
    (9, 0): ["Llama-3-8B 32/8", "- contiguous", "- prefill", "- all features", GROUP_OF_8, "- int8"],
}
KERNELS = [
    pytest.param(name, cc, id=f"{name}-sm_{cc[0]}{cc[1]}", marks=[pytest.mark.slow] * (name == GROUP_OF_8))
    for cc, names in CHOSEN.items()
    for name in names
]
# With this scope, all tests of a kernel come together and in one process, which compiles it once.
each_kernel = pytest.mark.parametrize(("name", "capability"), KERNELS, scope="module")


@cache
def compiled(name: str, capability: tuple[int, int]) -> Code:
    variant = sass.variants()[name]
    bounds = (NUM_THREADS, variant.blocks_per_multiprocessor)
    return compile_kernel(attention_kernel(variant), sass.types_of(variant), bounds, capability)


@cache
def loop_of(name: str, capability: tuple[int, int]) -> list[str]:
    """The loop over tiles."""
    return loop_with_most(disassemble(compiled(name, capability)), "HMMA")


def loads_for_a_tile(variant: KernelVariant) -> int:
    """Loads of 16 bytes that a lane makes for K and V of a tile."""
    element = ELEMENTS[variant.cache]
    return 2 * 8 * element.per_word * variant.head_size * element.bits // 8 // (32 * 16)


@each_kernel
def test_no_spills_no_stack_no_float64(name: str, capability: tuple[int, int]) -> None:
    code, variant = compiled(name, capability), sass.variants()[name]
    assert (code.stack_bytes, code.spill_stores, code.spill_loads) == (0, 0, 0)
    assert code.registers * NUM_THREADS * variant.blocks_per_multiprocessor <= 65536
    assert code.shared_bytes * variant.blocks_per_multiprocessor < 100 * 1024
    assert ".f64" not in code.ptx, "a Python float or float64 math slipped into the kernel"
    assert ".local" not in code.ptx, "an array went to local memory"
    assert "ld.global.nc.L2::128B.v4.u32" in code.ptx


@needs_disassembler
@each_kernel
def test_the_loop_has_16_byte_loads_and_no_division(name: str, capability: tuple[int, int]) -> None:
    loop, variant = loop_of(name, capability), sass.variants()[name]
    operations = [operation(line) for line in loop]
    loads = [each for each in operations if each.startswith("LDG")]
    wide = [each for each in loads if ".128" in each]
    assert len(wide) == loads_for_a_tile(variant)  # all of K and V, and each once: the loop is one tile
    assert len(loads) - len(wide) == (1 if variant.block_size else 0)  # the table entry of the tile after the next
    assert "__" not in " ".join(loop), "a division, or something else that is a function, was called"
    divisions = {"I2F", "F2I", "MUFU"}  # how 32-bit integers and float32 are divided
    for each in operations:
        assert not each.startswith(("DADD", "DMUL", "DFMA", "LDL", "STL")), each
        tanh = variant.softcap and each == "MUFU.RCP"
        assert each.split(".")[0] not in divisions or each == "MUFU.EX2" or tanh, each


@needs_disassembler
@each_kernel
def test_the_instruction_budget(name: str, capability: tuple[int, int]) -> None:
    """Warp instructions for each KiB of K and V. 150 would be three quarters of what an H200 can issue."""
    variant = sass.variants()[name]
    cost = sass.cost(name, variant, capability)
    assert cost.instructions == len(loop_of(name, capability))
    assert cost.per_kib <= {16: 60, 32: 75, 8: 150}[ELEMENTS[variant.cache].bits]
    assert cost.kib_in_flight >= 40  # 4.8 TB/s for a microsecond are 36 KiB for each of 132 multiprocessors
    assert cost.spills == 0


@needs_disassembler
def test_paging_costs_a_tenth_of_the_instructions() -> None:
    """And its one load is made two tiles ahead: it never waits."""
    paged, contiguous = loop_of("Llama-3-8B 32/8", (9, 0)), loop_of("- contiguous", (9, 0))
    assert 0 < len(paged) - len(contiguous) <= 0.12 * len(contiguous)
    for name in ("HMMA", "PRMT", "SHFL", "MUFU"):
        assert sum(name in line for line in paged) == sum(name in line for line in contiguous)


@pytest.mark.slow
@needs_disassembler
def test_a_group_of_8_costs_what_a_group_of_4_does() -> None:
    assert len(loop_of(GROUP_OF_8, (9, 0))) == len(loop_of("Llama-3-8B 32/8", (9, 0)))


def test_the_kernel_that_merges_parts() -> None:
    types = ("uint16*", "float32*", "float32*", "float32*", "int32*", "int64", "int64", "float32*")
    code = compile_kernel(combine_kernel("float16", 128, True, True), types, (NUM_THREADS, 8), (9, 0))
    assert (code.stack_bytes, code.spill_stores, code.spill_loads) == (0, 0, 0)
    assert ".f64" not in code.ptx
    assert code.registers <= 64


def test_types_are_those_that_the_launch_passes() -> None:
    """The table above is of the kernels that run."""
    from support.attention_calls import call_of
    from support.attention_cases import Case, build
    from support.launched import flash_launches

    from paged_ref.tuned import flash
    from paged_ref.tuned.machine_code import parameters

    for case in (Case(cache_dtype="float16", query_dtype="float16"), Case(), Case(cache_dtype="int8")):
        for form in ("paged", "contiguous"):
            call = call_of(build(case), form)
            for num_splits in (1, 2):
                variant = replace(flash.kernel_variant_of(call), split=num_splits > 1)
                assert parameters(flash_launches(call, num_splits)[0].args) == sass.types_of(variant)


@needs_disassembler
def test_the_table_is_printed_and_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "sass.json"
    assert main(["bench", "sass", "--kernel", "Llama-3-8B", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    costs = json.loads(file.read_text())["costs"]
    assert [each["capability"] for each in costs] == ["sm_80", "sm_90"]
    for each, line in zip(costs, [line for line in lines if "Llama" in line], strict=True):
        assert line.split()[2:4] == [str(each["registers"]), str(each["spills"])]


def test_an_unknown_kernel_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sass", "--kernel", "nonesuch"]) == 2
    assert "--kernel is 'nonesuch'; known are: Llama-3-8B 32/8; - contiguous" in capsys.readouterr().err
