"""Without a GPU nothing runs on CuPy. That it has what we ask of it, by these names and keywords, can be read."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

import paged_ref

cupy = pytest.importorskip("cupy", reason="CuPy is not installed (extra cuda12 or cuda13)")
SOURCE = Path(paged_ref.__file__).parent
METHODS = {"max", "min", "sum", "mean", "prod", "any", "all", "argmax", "argmin"}  # of arrays; NumPy's take more


def calls(tree: ast.AST) -> list[tuple[ast.Call, ast.Attribute]]:
    return [
        (node, node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]


def is_xp(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "xp"


def path_from_xp(node: ast.Attribute) -> list[str]:
    """The names after `xp` in xp.cuda.Stream and the like; [] where something else stands in front."""
    if is_xp(node.value):
        return [node.attr]
    before = path_from_xp(node.value) if isinstance(node.value, ast.Attribute) else []
    return [*before, node.attr] if before else []


def keywords_of(function: Any) -> set[str] | None:
    """What it takes by keyword; None for anything. Cython's functions say it in the first line of their words."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {word.split("=")[0].strip(" *") for word in (function.__doc__ or "").split(")")[0].split(",")}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return set(parameters)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_cupy_has_it(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found: Any = cupy
            for step in path_from_xp(node):
                assert hasattr(found, step), f"line {node.lineno}: {step} in {ast.unparse(node)}"
                found = getattr(found, step)
    for call, name in calls(tree):
        if is_xp(name.value):
            known = keywords_of(getattr(cupy, name.attr))
        elif name.attr in METHODS:
            known = keywords_of(getattr(cupy.ndarray, name.attr))
        else:
            continue
        for keyword in call.keywords:
            assert known is None or keyword.arg in known, f"line {call.lineno}: {name.attr}({keyword.arg}=...)"
