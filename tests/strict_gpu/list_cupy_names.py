"""Writes cupy_names.json: the names, parameters and ufuncs of the installed CuPy. It needs CuPy, and no GPU.

python tests/strict_gpu/list_cupy_names.py
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

NAMES = Path(__file__).with_name("cupy_names.json")


def parameters(function: Any) -> str:
    """The names of the parameters, a star before those that are given by name only; "?" where CuPy does not say."""
    try:
        found = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return "?"
    marks: dict[Any, str] = {
        inspect.Parameter.KEYWORD_ONLY: "*",
        inspect.Parameter.VAR_POSITIONAL: "**",
        inspect.Parameter.VAR_KEYWORD: "***",
    }
    return " ".join(marks.get(parameter.kind, "") + parameter.name for parameter in found)


def public(owner: Any) -> list[str]:
    return [name for name in dir(owner) if not name.startswith("_")]


def names() -> dict[str, Any]:
    import cupy
    import cupyx

    ufunc, generator = type(cupy.add), cupy.random.Generator  # loaded when it is first named, and listed then
    values = {name: getattr(cupy, name) for name in public(cupy)}
    ufuncs = {name: [value.nin, value.nout] for name, value in values.items() if isinstance(value, ufunc)}
    functions = {
        name: parameters(value)
        for name, value in values.items()
        if callable(value) and name not in ufuncs and not inspect.isclass(value)
    }
    runtime = cupy.cuda.runtime
    cuda = {
        name: public(getattr(cupy.cuda, name)) for name in ("Device", "Event", "MemoryHook", "MemoryPool", "Stream")
    }
    return {
        "version": cupy.__version__,
        "ufuncs": ufuncs,
        "functions": functions,
        "others": [name for name in values if name not in ufuncs and name not in functions],
        "ndarray": {name: parameters(getattr(cupy.ndarray, name)) for name in dir(cupy.ndarray)},
        "random": {name: parameters(getattr(cupy.random, name)) for name in public(cupy.random)},
        "Generator": {name: parameters(getattr(generator, name)) for name in public(generator)},
        "cuda": {name: " ".join(cuda.get(name, ())) for name in public(cupy.cuda)},
        "runtime": {name: value for name in public(runtime) if isinstance(value := getattr(runtime, name), int)},
        "runtime functions": [name for name in public(runtime) if callable(getattr(runtime, name))],
        "cupyx": public(cupyx),
    }


if __name__ == "__main__":
    found = names()
    parts = [f"{json.dumps(key)}: {json.dumps(value, separators=(', ', ': '))}" for key, value in found.items()]
    NAMES.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    print({key: len(value) for key, value in found.items()})
