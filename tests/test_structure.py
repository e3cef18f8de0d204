"""The house: a module imports from its own floor or from lower ones, and importing the package is light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from paged_ref.core.device import on_gpu

SOURCE = Path(__file__).resolve().parent.parent / "src" / "paged_ref"
FLOORS = [
    {"core"},
    {"extras"},
    {"tuned"},
    {"interop", "tracer", "timeline"},
    {"beyond_device"},
    {"views", "planner", "training"},
    {"bench"},
    {"commands", "lesson"},
]
DOORS = {"__init__", "__main__", "cli", "kernels", "llm"}  # they put rooms together, and stand outside the floors
# The imports that the move of the core has still to cut: file -> rooms.
STILL_TO_CUT = json.loads((Path(__file__).parent / "still_to_cut.json").read_text(encoding="utf-8"))


def room_of(module: str) -> str:
    """`paged_ref.core.attention.paged` stands in the room `kernels`."""
    return module.split(".")[1] if "." in module else ""


def floor_of(room: str) -> int:
    return next(floor for floor, rooms in enumerate(FLOORS) if room in rooms)


def imports_of(path: Path) -> set[str]:
    """The modules of this package that the file imports, absolute, nested imports included."""
    package = ["paged_ref", *path.relative_to(SOURCE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "paged_ref":  # `from .. import device`
                found |= {f"paged_ref.{alias.name}" for alias in node.names}
            elif module.startswith("paged_ref."):
                found.add(module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("paged_ref.")}
    return found


def forbidden(path: Path) -> set[str]:
    """The rooms that the file imports although they are on its own floor or above it."""
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if room in DOORS:
        return set()
    targets = {room_of(module) for module in imports_of(path)} - {"", room, "__version__"} - DOORS
    return {target for target in targets if floor_of(target) >= floor_of(room)}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    assert forbidden(path) <= set(STILL_TO_CUT.get(str(path.relative_to(SOURCE)), ()))


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_loads_no_compiler_and_no_gpu_library() -> None:
    heavy = {"numba", "cupy", "torch", "tokenizers", "numba.cuda"}
    assert not loaded_by("import paged_ref") & heavy
    assert not loaded_by("import paged_ref.kernels") & heavy


@pytest.mark.skipif(on_gpu, reason="a GPU is in use")
def test_the_engine_does_not_touch_numba_cuda_or_cupy_without_a_gpu() -> None:
    statement = "import paged_ref; paged_ref.LLM('tiny', backend='reference').generate('Once')"
    assert not loaded_by(statement) & {"numba.cuda", "cupy"}
