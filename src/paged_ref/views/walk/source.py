"""The source of the two kernels, as the kernel walk shows it: which lines differ, and which line made an access."""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from ...tracer.access_record import IntArray, Trace

Source = tuple[Sequence[str], int]  # lines, and the number of the first


@dataclass(frozen=True, slots=True, eq=False)
class SourceLines:
    """The kernel's source, its docstring folded away: (number in the file, text) of each line."""

    file: str
    lines: tuple[tuple[int, str], ...]
    different: dict[int, str]  # number of a line that the other kernel has otherwise -> that kernel's text

    def text(self, number: int) -> str:
        return next((text for n, text in self.lines if n == number), "")


def lines_of_kernel(trace: Trace) -> IntArray:
    """The kernel's own line of each access. An access in a device function counts for the line of the call."""
    source, first = inspect.getsourcelines(trace.function)
    line = trace.line.copy()
    for name in trace.function.__code__.co_names:
        helper = getattr(trace.function.__globals__.get(name), "py_func", None)
        if helper is None:
            continue
        of_helper, start = inspect.getsourcelines(helper)
        inside = (line >= start) & (line < start + len(of_helper)) & ((line < first) | (line >= first + len(source)))
        call = next(first + i for i, text in enumerate(source) if f"{name}(" in text)
        line[inside] = call
    return line


def compared(name: str, source: Source, other: Source) -> SourceLines:
    """The source of kernel `name`, compared with the other kernel's."""
    lines, other_lines = fold(source), fold(other)
    matcher = difflib.SequenceMatcher(None, [t for _, t in lines], [t for _, t in other_lines], autojunk=False)
    different = {}
    for what, start, end, other_start, other_end in matcher.get_opcodes():
        if what == "replace" and end - start == other_end - other_start:
            pairs = zip(lines[start:end], other_lines[other_start:other_end], strict=True)
            different.update({number: text for (number, _), (_, text) in pairs})
    return SourceLines(f"{name}.py", tuple(lines), different)


def fold(source: Source) -> list[tuple[int, str]]:
    """The lines of a function, each with its number. The docstring is cut to `\"\"\"...\"\"\"`."""
    lines, first = source
    function = ast.parse(textwrap.dedent("".join(lines))).body[0]
    assert isinstance(function, ast.FunctionDef)
    numbered = [(first + i, text.rstrip("\n")) for i, text in enumerate(lines)]
    if ast.get_docstring(function) is None:
        return numbered
    begin, end = function.body[0].lineno - 1, function.body[0].end_lineno
    text = numbered[begin][1]
    numbered[begin:end] = [(first + begin, text[: len(text) - len(text.lstrip())] + '"""..."""')]
    return numbered
