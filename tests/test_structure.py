"""The house and its measured promises: floors, doors, no circle of files, what is counted in the core."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from paged_ref.core.device import on_gpu
from paged_ref.core.engine.llm import LLM
from paged_ref.core.engine.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "paged_ref"
CORE = SOURCE / "core"
FILES = sorted(SOURCE.rglob("*.py"))
CORE_FILES = sorted(CORE.rglob("*.py"))
FLOORS = [
    {"core"},
    {"extras"},
    {"tuned"},
    {"interop", "tracer", "timeline", "distributed"},
    {"beyond_device"},
    {"views", "planner", "training"},
    {"bench"},
    {"commands", "lesson"},
]
UPPER = {"views", "planner", "training", "bench", "commands", "lesson"}
# The doors put rooms together, and stand outside the floors. Rooms that may go through them:
DOORS = {
    "llm": UPPER, "kernels": UPPER | {"beyond_device"}, "notebook": set(), "__init__": UPPER, "__main__": set(),
    "cli": {"commands"},
}  # fmt: skip

# In the order in which the README gives them to the reader.
READING_PATH = (
    "attention/addressing", "attention/naive", "attention/paged", "attention/reference",
    "memory/block_pool", "memory/manager", "memory/paged",
    "engine/sequence", "engine/scheduler", "model/llama", "engine/engine",
)  # fmt: skip


def short(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


# --- imports ---------------------------------------------------------------------------------------------


def file_of(module: str) -> Path | None:
    """The file of `paged_ref.core.device`; None for a name that is no module."""
    path = SOURCE.joinpath(*module.split(".")[1:])
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


@cache
def imports_of(path: Path) -> frozenset[Path]:
    """The files of this package that a file imports, those inside functions and under TYPE_CHECKING included."""
    package = ["paged_ref", *path.relative_to(SOURCE).parts[:-1]]
    modules: list[str] = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from .attention import naive` imports a file; `from .naive import attention_kernel` a name of one
            modules += [f"{module}.{a.name}" if file_of(f"{module}.{a.name}") else module for a in node.names]
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    ours = [module for module in modules if module.split(".")[0] == "paged_ref"]
    return frozenset(file for module in ours if (file := file_of(module)) is not None) - {path}


def room_of(path: Path) -> str:
    """`core/attention/paged.py` stands in the room `core`, and a door is a room of its own."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(floor for floor, rooms in enumerate(FLOORS) if room in rooms)


def forbidden(path: Path) -> set[str]:
    """The rooms and doors that the file imports although it may not."""
    room = room_of(path)
    if room in DOORS:
        return set()
    targets = {room_of(file) for file in imports_of(path)} - {room}
    doors = {target for target in targets if target in DOORS}
    # `from .. import __version__` opens no room
    closed = {door for door in doors if room not in DOORS[door] and door != "__init__"}
    return closed | {target for target in targets - doors if floor_of(target) >= floor_of(room)}


@pytest.mark.parametrize("path", FILES, ids=short)
def test_imports_go_down(path: Path) -> None:
    assert forbidden(path) == set()


@pytest.mark.parametrize("path", CORE_FILES, ids=short)
def test_the_core_imports_only_the_core(path: Path) -> None:
    assert {room_of(file) for file in imports_of(path)} <= {"core"}


def circles() -> list[list[str]]:
    """The sets of files that import each other in a circle (strongly connected components, Tarjan 1972)."""
    index: dict[Path, int] = {}
    lowest: dict[Path, int] = {}
    stack: list[Path] = []
    found: list[list[str]] = []

    def visit(path: Path) -> None:
        index[path] = lowest[path] = len(index)
        stack.append(path)
        for file in imports_of(path):
            if file not in index:
                visit(file)
            if file in stack:
                lowest[path] = min(lowest[path], lowest[file])
        if lowest[path] == index[path]:
            members = stack[stack.index(path) :]
            del stack[stack.index(path) :]
            if len(members) > 1:
                found.append(sorted(short(member) for member in members))

    for path in FILES:
        if path not in index:
            visit(path)
    return sorted(found)


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles() == []


# --- what importing loads --------------------------------------------------------------------------------


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_loads_no_compiler_and_no_gpu_library() -> None:
    heavy = {"numba", "cupy", "torch", "tokenizers", "numba.cuda"}
    assert not loaded_by("import paged_ref") & heavy
    assert not loaded_by("import paged_ref.kernels") & heavy


def test_importing_the_core_loads_no_other_room() -> None:
    ours = {
        name.split(".")[1] for name in loaded_by("import paged_ref.core.engine.llm") if name.startswith("paged_ref.")
    }
    assert ours == {"core"}


@pytest.mark.skipif(on_gpu, reason="a GPU is in use")
@pytest.mark.parametrize("door", ["paged_ref.core.engine.llm", "paged_ref"])
def test_the_engine_does_not_touch_numba_cuda_or_cupy_without_a_gpu(door: str) -> None:
    statement = f"from {door} import LLM; LLM('tiny', backend='reference').generate('Once')"
    assert not loaded_by(statement) & {"numba.cuda", "cupy"}


# --- the size of the core --------------------------------------------------------------------------------


def test_the_core_has_at_most_2900_lines() -> None:
    assert sum(num_lines(path) for path in CORE_FILES) <= 2_900


def test_the_room_for_several_workers_has_at_most_350_lines() -> None:
    assert sum(num_lines(path) for path in (SOURCE / "distributed").glob("*.py")) <= 350


def test_the_reading_path_has_at_most_1500_lines() -> None:
    assert sum(num_lines(CORE / f"{name}.py") for name in READING_PATH) <= 1_500


def test_the_readme_lists_the_reading_path_in_its_order_with_its_line_counts() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|\n]*core/([a-z_]+/[a-z_]+)\.py[^|\n]*\|\s*(\d[\d,]*)\s*\|", readme, flags=re.MULTILINE)
    counted = [(name, str(num_lines(CORE / f"{name}.py"))) for name in READING_PATH]
    assert [(name, count.replace(",", "")) for name, count in rows] == counted
    assert f"These {sum(int(count) for _, count in counted):,} lines" in readme


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.AsyncFor, ast.ExceptHandler, ast.Assert, ast.comprehension)


def functions_of(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            yield node


def is_kernel(function: ast.FunctionDef) -> bool:
    """Is it compiled by Numba: `cuda.jit`, `njit`, with or without arguments?"""
    return any(re.match(r"(cuda\.jit|njit)\b", ast.unparse(decorator)) for decorator in function.decorator_list)


def complexity(function: ast.FunctionDef) -> int:
    """McCabe 1976: 1, and 1 for each way in which the path can fork. Nested functions are counted for themselves."""
    total, todo = 1, list(function.body)
    nodes: list[Any] = list(todo)
    while nodes:
        node = nodes.pop()
        if isinstance(node, FUNCTIONS):
            continue
        if isinstance(node, BRANCHES):
            total += 1 + (len(node.ifs) if isinstance(node, ast.comprehension) else 0)
        elif isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        elif isinstance(node, ast.match_case):
            total += 1
        nodes += ast.iter_child_nodes(node)
    return total


def test_complexity_counts_the_forks_of_the_path() -> None:
    source = """
def f(a, b):
    if a and b or not a:
        return [x for x in b if x]
    while a:
        a -= 1 if b else 2
    def inner():
        if a: pass
"""
    outer = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    assert complexity(outer) == 1 + 1 + 2 + 2 + 1 + 1  # itself, if, and/or, comprehension, while, the inner if


@pytest.mark.parametrize("path", CORE_FILES, ids=short)
def test_functions_of_the_core_are_short_and_simple(path: Path) -> None:
    for function in functions_of(path):
        if not is_kernel(function):
            length = (function.end_lineno or 0) - function.lineno + 1
            assert length <= 60, f"{function.name} has {length} lines"
            assert complexity(function) <= 12, f"{function.name} has the complexity {complexity(function)}"


def test_only_the_kernels_are_excepted() -> None:
    kernels = {
        (path.name, function.name) for path in CORE_FILES for function in functions_of(path) if is_kernel(function)
    }
    assert kernels == {
        ("naive.py", "attention_kernel"), ("paged.py", "attention_kernel"), ("cpu.py", "attention_loop"),
    }  # fmt: skip


# --- position -> slot -> row, and never back -------------------------------------------------------------


def divisions(path: Path) -> list[str]:
    """Every `//`, `%` or divmod of the file in which a block size takes part."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.FloorDiv, ast.Mod)):
            operands = [ast.unparse(node.left), ast.unparse(node.right)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("divmod", "floor_divide", "mod"):
            operands = [ast.unparse(argument) for argument in node.args]
        else:
            continue
        if any("block_size" in operand or "unit" in operand for operand in operands):
            found.append(ast.unparse(node))
    return found


def test_in_attention_only_the_formula_divides_by_the_block_size() -> None:
    found = {short(path): those for path in sorted((CORE / "attention").glob("*.py")) if (those := divisions(path))}
    assert found.pop("core/attention/addressing.py") == ["position // block_size", "position % block_size"]
    assert found == {"core/attention/attention.py": ["-seq_lens // block_size"]}  # the blocks that a length needs


def test_no_slot_is_divided_back_into_block_and_offset() -> None:
    """What the core divides by a block size is a position, a length or a number of tokens."""
    counts = re.compile(
        r"^\(?-?\(?(\w+\.)*(position|length|seq_lens|num_tokens|num_written|prompt_len|kv_cache_tokens|num_slots)\b"
    )
    for path in CORE_FILES:
        for division in divisions(path):
            assert counts.match(division), f"{short(path)}: {division}"
            if "num_slots" in division:  # of the whole pool
                assert "manager.num_slots" in division


# --- one decode step -------------------------------------------------------------------------------------


def calls_of_a_decode_step(llm: Any, num_seqs: int) -> int:
    """Python calls into the package during one step that computes one token of each sequence."""
    for i in range(num_seqs):
        llm.add_request([5 + i, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True))
    for _ in range(2):  # the prompts, and one decode step that fills caches
        llm.step()
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        if event == "call" and frame.f_code.co_filename.startswith(str(SOURCE)):
            calls += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        tokens = llm.engine.step()
    finally:
        sys.setprofile(before)
    assert len(tokens) == num_seqs
    for request_id in list(llm.engine.requests):
        llm.engine.abort(request_id)
    return calls


@pytest.mark.parametrize(("num_seqs", "most"), [(1, 160), (4, 240)])
def test_a_decode_step_of_the_core_makes_few_calls(num_seqs: int, most: int) -> None:
    assert calls_of_a_decode_step(LLM("tiny", backend="reference"), num_seqs) <= most


@pytest.mark.parametrize(("num_seqs", "most"), [(1, 160), (4, 240)])
def test_a_decode_step_of_the_public_llm_makes_few_calls(num_seqs: int, most: int) -> None:
    import paged_ref

    assert calls_of_a_decode_step(paged_ref.LLM("tiny", backend="reference"), num_seqs) <= most
