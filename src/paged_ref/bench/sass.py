"""`paged-ref bench sass`: what the tuned kernels cost, counted from their machine code. Needs no GPU.

A kernel at the speed of memory must issue its instructions in the time in which memory brings their bytes. So
the unit is warp instructions for each KiB of K and V read, counted in the loop over tiles. The loop's rare part
(a new largest score) is counted as if it always ran. `issue` is the share of what an H200 can issue meanwhile.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from ..views.common import options
from ..views.common.console import Console
from ..views.common.versions import versions
from .results import table_of, write_results

if TYPE_CHECKING:
    from ..tuned.flash_variant import KernelVariant

# NVIDIA's figures for the H200 SXM: HBM3e bytes and multiprocessors; 4 schedulers each; the base boost clock.
BYTES_PER_SECOND, MULTIPROCESSORS, SCHEDULERS, CLOCK = 4.8e12, 132, 4, 1.755e9
ISSUE_PER_KIB = MULTIPROCESSORS * SCHEDULERS * CLOCK / (BYTES_PER_SECOND / 1024)

CAPABILITIES = ((8, 0), (9, 0))
LEGEND = (
    "32/8: query heads on KV heads. A line with a dash differs from the first in what",
    "it names. regs: of a thread; fit: CUDA blocks of 4 warps on a multiprocessor;",
    "flight: KiB of K and V that they keep in flight there. loads of 16 bytes, mma",
    "and all instructions of the loop over tiles; /KiB: of K and V read. issue: of",
    f"the {ISSUE_PER_KIB:.0f} warp instructions that an H200 can issue while it reads a KiB.",
)
PACKAGES = ("numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvdisasm")


@dataclass(frozen=True)
class KernelCost:
    """A compiled kernel, in numbers."""

    name: str
    capability: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int
    blocks: int  # of 128 threads that fit on a multiprocessor
    kib_in_flight: float  # of K and V for each multiprocessor
    loads: int  # of 16 bytes, in the loop
    tensor: int  # tensor core instructions in the loop
    instructions: int  # in the loop
    per_kib: float  # warp instructions for each KiB of K and V

    @property
    def issue(self) -> float:
        """Share of an H200's issue slots, at its full bandwidth."""
        return self.per_kib / ISSUE_PER_KIB


def variants() -> dict[str, KernelVariant]:
    """The kernels of the table: shapes of known models, kinds of cache, what paging and features add."""
    from ..tuned.flash_variant import KernelVariant

    llama = KernelVariant("float16", "float16", 128, 4, 16, split=True)
    return {
        "Llama-3-8B 32/8": llama,
        "- contiguous": replace(llama, block_size=None),
        "- blocks of 8": replace(llama, block_size=8),
        "- prefill": replace(llama, split=False, prefill=True, mixed=True),
        "- all features": replace(llama, window=True, softcap=True, alibi=True, sinks=True),
        "Llama-2-7B 32/32": replace(llama, group_size=1),
        "Llama-3-70B/8 8/1": replace(llama, group_size=8),
        "Qwen2.5-0.5B 14/2": replace(llama, group_size=7, head_size=64),
        "head size 256": replace(llama, head_size=256),
        "- bfloat16": replace(llama, cache="bfloat16", query="bfloat16"),
        "- query float32": replace(llama, query="float32"),
        "- float32": replace(llama, cache="float32", query="float32"),
        "- int8": replace(llama, cache="int8"),
        "- float8": replace(llama, cache="e4m3"),
    }


def types_of(variant: KernelVariant) -> tuple[str, ...]:
    """The kernel's parameters, as flash.py passes them, with tables and lengths in int32."""
    query = "float32*" if variant.query == "float32" else "uint16*"
    return (
        "float32*" if variant.split else query, "float32*", "uint32*" if variant.exact else query,
        "uint32*", "uint32*", "int32*", "int64", "int32*", "int32*", "int64", "int64", *["uint32"] * 6,
        "float32", "int64", "float32", *["float32*"] * 4,
    )  # fmt: skip


def cost(name: str, variant: KernelVariant, capability: tuple[int, int]) -> KernelCost:
    """Compile the variant, and count."""
    from ..tuned.flash_elements import ELEMENTS
    from ..tuned.flash_kernels import attention_kernel
    from ..tuned.flash_variant import NUM_THREADS, NUM_WARPS
    from ..tuned.machine_code import compile_kernel, disassemble, loop_with_most, operation

    bounds = (NUM_THREADS, variant.blocks_per_multiprocessor)
    code = compile_kernel(attention_kernel(variant), types_of(variant), bounds, capability)
    loop = [operation(line) for line in loop_with_most(disassemble(code), "HMMA")]
    loads = sum(name.startswith("LDG") and ".128" in name for name in loop)
    kib = loads * 32 * 16 / 1024  # each lane of the warp reads 16 bytes
    blocks = 65536 // (NUM_THREADS * -(-code.registers // 8) * 8)
    tile_kib = 2 * 8 * ELEMENTS[variant.cache].per_word * variant.head_size * ELEMENTS[variant.cache].bits / 8 / 1024
    tiles_ahead = 0.5 if variant.wide else 1.0  # wide: either K or V of a tile is loaded at a time
    return KernelCost(
        name=name, capability=f"sm_{capability[0]}{capability[1]}",
        registers=code.registers, shared_bytes=code.shared_bytes, stack_bytes=code.stack_bytes,
        spills=code.spill_stores + code.spill_loads,
        blocks=blocks, kib_in_flight=blocks * NUM_WARPS * tile_kib * tiles_ahead,
        loads=loads, tensor=sum(name.startswith("HMMA") for name in loop),
        instructions=len(loop), per_kib=len(loop) / kib,
    )  # fmt: skip


def report_of(costs: Iterable[KernelCost], title: str) -> Table:
    headings = ("kernel", "regs", "spill", "fit", "flight", "loads", "mma", "loop", "/KiB", "issue")
    rows = (
        (
            each.name, str(each.registers), str(each.spills), str(each.blocks), f"{each.kib_in_flight:.0f}",
            str(each.loads), str(each.tensor), str(each.instructions), f"{each.per_kib:.0f}", f"{each.issue:.0%}",
        )
        for each in costs
    )  # fmt: skip
    table = table_of(headings, rows, title=title, title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
    table.columns[0].justify, table.columns[0].no_wrap = "left", True
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", action="append", metavar="WORDS", help="only kernels whose name has these words")
    options.json_output(parser, "write the numbers to FILE too")


def main(args: argparse.Namespace) -> int:
    chosen = _chosen(args.kernel or [])
    console, costs = Console(), []
    for capability in CAPABILITIES:
        with Console(stderr=True).status("compiling, which takes a minute or two ..."):
            rows = [cost(name, variant, capability) for name, variant in chosen.items()]
        console.print(report_of(rows, f"Tuned kernels for {rows[0].capability}"))
        costs += rows
    tools = {package: number or "-" for package, number in versions(PACKAGES).items()}
    for line in (*LEGEND, *map(" ".join, tools.items())):
        console.print(line)
    write_results(args.json, tools=tools, costs=[asdict(each) for each in costs])
    return 0


def _chosen(wanted: list[str]) -> dict[str, KernelVariant]:
    """The variants whose names have one of these words; without words, all variants. Raises ValueError."""
    from ..tuned.machine_code import missing_packages

    if missing := missing_packages():
        raise ValueError(f"{', '.join(missing)} not installed here; pip install 'paged_ref[ptx]' brings all of it")
    known = variants()
    chosen = {name: variant for name, variant in known.items() if not wanted or any(words in name for words in wanted)}
    if not chosen:
        raise ValueError(f"--kernel is {' '.join(wanted)!r}; known are: {'; '.join(known)}")
    return chosen
