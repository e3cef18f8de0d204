"""Compiled kernels as files: written once, read later, and never those of another kernel."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda makes the kernels (extra test, cuda12 or cuda13)")
pytest.importorskip("cuda.bindings.nvjitlink", reason="cuda-bindings links PTX to machine code")

from paged_ref.tuned import cubins, machine_code
from paged_ref.tuned.flash_combine import combine_kernel
from paged_ref.tuned.flash_elements import ELEMENTS
from paged_ref.tuned.flash_kernels import attention_kernel
from paged_ref.tuned.flash_variant import KernelVariant
from paged_ref.tuned.fused_kernels import gated_kernel, rms_norm_kernel
from paged_ref.tuned.machine_code import Code, check_versions, compiler_fault
from paged_ref.tuned.store_kernels import copy_blocks_kernel, write_rows_kernel

LLAMA = KernelVariant("float16", "float16", 128, 4, 16, split=True)
WHAT: Any = (gated_kernel, ("float32*", "float32*", "int64"), (256, 1), (9, 0))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What was compiled, with the folder in place."""
    what: list[Any] = []

    def compile_kernel(*key: Any) -> Code:
        what.append(key)
        return Code("entry", "", b"\n\x7fELF\n", 20, 0, 0, 0, 0)

    monkeypatch.setattr(machine_code, "compile_kernel", compile_kernel)
    monkeypatch.setenv("PAGED_REF_CUBINS", str(tmp_path))
    return what


def test_a_kernel_is_compiled_once_and_then_read(compiled: list[Any], tmp_path: Path) -> None:
    assert cubins.code_of(*WHAT) == ("entry", b"\n\x7fELF\n")
    assert cubins.code_of(*WHAT) == ("entry", b"\n\x7fELF\n")
    assert compiled == [WHAT]
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    major, minor = machine_code.linker_version()
    assert file.parent.name == f"cuda{major}.{minor}-sm90"
    assert file.name.startswith("gated_kernel-")


@pytest.mark.parametrize("left", [b"", b'{"name": "entry"', b'{"name": "entry", "bytes": 7}\n\n\x7fEL'])
def test_a_file_that_is_cut_short_is_made_anew(compiled: list[Any], tmp_path: Path, left: bytes) -> None:
    cubins.code_of(*WHAT)
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    file.write_bytes(left)
    assert cubins.code_of(*WHAT) == ("entry", b"\n\x7fELF\n")
    assert len(compiled) == 2


def test_without_a_folder_nothing_is_written(
    compiled: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PAGED_REF_CUBINS")
    cubins.code_of(*WHAT)
    cubins.code_of(*WHAT)
    assert len(compiled) == 2
    assert list(tmp_path.iterdir()) == []


def test_each_kernel_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [replace(LLAMA, cache=name) for name in ELEMENTS]
    variants += [replace(LLAMA, query="bfloat16", cache="bfloat16"), replace(LLAMA, group_size=8)]
    variants += [replace(LLAMA, mixed=True), replace(LLAMA, window=True), replace(LLAMA, softcap=True)]
    types: tuple[str, ...] = ("float32*",)
    what = [(attention_kernel(variant), types, (128, 3), (9, 0)) for variant in variants]
    what += [(kernel, types, (256, 1), (9, 0)) for kernel in (gated_kernel, rms_norm_kernel)]
    what += [(gated_kernel, ("float16*",), (256, 1), (9, 0)), (gated_kernel, types, (128, 1), (9, 0))]
    what.append((gated_kernel, types, (256, 1), (8, 0)))
    names = {cubins.file_name(*each) for each in what}
    assert len(names) == len(what)
    monkeypatch.setattr(machine_code, "linker_version", lambda: (1, 2))
    assert cubins.file_name(*WHAT).startswith("cuda1.2-sm90/")
    monkeypatch.setattr(cubins, "source_digest", lambda: "other sources")
    assert cubins.file_name(*what[0]).split("-")[-1] not in {name.split("-")[-1] for name in names}


def test_another_process_finds_the_same_name() -> None:
    kernel = attention_kernel(LLAMA)
    assert "0x" not in cubins.constants_of(kernel)  # no address of an object
    code = (
        "from paged_ref.tuned import cubins; from paged_ref.tuned.flash_kernels import attention_kernel;"
        "from paged_ref.tuned.flash_variant import KernelVariant;"
        "kernel = attention_kernel(KernelVariant('float16', 'float16', 128, 4, 16, split=True));"
        "print(cubins.file_name(kernel, ('a',), (1, 1), (9, 0)))"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == cubins.file_name(kernel, ("a",), (1, 1), (9, 0))


def test_the_sources_are_those_of_every_function_of_a_kernel() -> None:
    sources = {path for pattern in cubins.SOURCES for path in cubins.ROOT.glob(pattern)}
    kernels = (attention_kernel(LLAMA), combine_kernel("float16", 64, True, True), write_rows_kernel("float32", "int8"))
    for kernel in (*kernels, gated_kernel, rms_norm_kernel, copy_blocks_kernel):
        modules = set(re.findall(r"paged_ref((?:\.[a-z_]+)+)\.", cubins.constants_of(kernel)))
        assert modules
        for module in modules:
            parts = module.split(".")[1:]
            while not (path := cubins.ROOT.joinpath(*parts).with_suffix(".py")).exists():
                parts.pop()  # a function inside another
            assert path in sources, module


def test_a_linker_older_than_the_compiler_is_refused() -> None:
    ptx = "// Cuda compilation tools, release 13.5, V13.5.37\n.version 9.5"
    for linker in ((13, 5), (13, 6), (14, 0)):
        check_versions(ptx, linker)
    with pytest.raises(
        RuntimeError, match=r"NVVM is of CUDA 13\.5 and nvJitLink of CUDA 13\.0, which cannot read newer"
    ):
        check_versions(ptx, (13, 0))


def test_numbas_own_ptx_says_the_version_of_nvvm() -> None:
    code = machine_code.compile_kernel(*WHAT)
    with pytest.raises(RuntimeError, match=r"NVVM is of CUDA \d+\.\d+ and nvJitLink of CUDA 1\.0"):
        check_versions(code.ptx, (1, 0))


def test_a_compiler_that_does_not_work_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler_fault((9, 0)) is None
    monkeypatch.setattr(machine_code, "linker_version", lambda: (1, 0))
    compiler_fault.cache_clear()
    try:
        assert "no kernel compiles: RuntimeError: NVVM is of CUDA" in str(compiler_fault((9, 0)))
    finally:
        compiler_fault.cache_clear()
