"""What a way of managing memory costs to read: lines of code, counted from the source that runs."""

from __future__ import annotations

import ast
import io
import tokenize
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent

# Technique -> its manager's files and its kernel's.
FILES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "standard": (("core/memory/standard.py", "core/memory/regions.py"), ("core/attention/naive.py",)),
    "standard, buddy": (("core/memory/standard.py", "extras/buddy.py"), ("core/attention/naive.py",)),
    "swapping": (("core/memory/swapping.py", "core/memory/regions.py"), ("core/attention/naive.py",)),
    "paged": (
        ("core/memory/paged.py", "core/memory/block_pool.py"),
        ("core/attention/paged.py", "core/attention/addressing.py"),
    ),
    "prefix cache": (
        ("core/memory/paged.py", "core/memory/block_pool.py", "extras/prefix_cache.py"),
        ("core/attention/paged.py", "core/attention/addressing.py"),
    ),
}


@cache
def code_lines(name: str) -> int:
    """Lines of a source file that hold code: no blank lines, no comments, no docstrings."""
    text = (SOURCE / name).read_text(encoding="utf-8")
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in skipped
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def lines_of(technique: str) -> tuple[int, int]:
    """(the manager's, its attention kernel's)."""
    manager, kernel = FILES[technique]
    return sum(map(code_lines, manager)), sum(map(code_lines, kernel))
