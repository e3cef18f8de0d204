"""What a way of managing memory costs to read: lines of code of the modules that it runs."""

from __future__ import annotations

import ast
import inspect
import io
import sys
import tokenize
from functools import cache
from types import ModuleType

from .setup import Setup

PACKAGE = __name__.partition(".")[0]
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of(setup: Setup) -> tuple[int, int]:
    """(lines of the setup's manager, lines of its attention kernel)."""
    from ..core.attention import addressing, naive, paged  # the kernels load a compiler

    manager = setup.make_manager()
    kernels = (paged, addressing) if manager.paged else (naive,)
    return sum(map(code_lines, modules_of(manager))), sum(map(code_lines, kernels))


def modules_of(manager: object) -> set[ModuleType]:
    """The modules of this package that define the manager and the parts that it holds (pools, a prefix cache). An
    abstract class is what all managers have in common, and is left out."""
    return {
        sys.modules[cls.__module__]
        for part in (manager, *vars(manager).values())
        for cls in type(part).__mro__
        if cls.__module__.partition(".")[0] == PACKAGE and not inspect.isabstract(cls)
    }


@cache
def code_lines(module: ModuleType) -> int:
    """Lines of the module that hold code: no blank lines, no comments, no docstrings."""
    text = inspect.getsource(module)
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)
