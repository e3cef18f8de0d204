"""The source of the two kernels, as the kernel walk shows it: which lines differ, and which line made an access."""

from __future__ import annotations

import difflib
import inspect
import io
import tokenize
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
        length, start = len(inspect.getsourcelines(helper)[0]), inspect.getsourcelines(helper)[1]
        inside = (line >= start) & (line < start + length) & ((line < first) | (line >= first + len(source)))
        call = next(first + i for i, text in enumerate(source) if f"{name}(" in text)
        line[inside] = call
    return line


def compared(name: str, source: Source, other: Source) -> SourceLines:
    """The source of kernel `name`, compared with the other kernel's."""
    lines, other_lines = _fold(source), _fold(other)
    matcher = difflib.SequenceMatcher(None, [t for _, t in lines], [t for _, t in other_lines], autojunk=False)
    different = {}
    for what, start, end, other_start, other_end in matcher.get_opcodes():
        if what == "replace" and end - start == other_end - other_start:
            pairs = zip(lines[start:end], other_lines[other_start:other_end], strict=True)
            different.update({number: text for (number, _), (_, text) in pairs})
    return SourceLines(f"{name}.py", tuple(lines), different)


def _fold(source: Source) -> list[tuple[int, str]]:
    """The lines of a function with its docstring cut to `\"\"\"...\"\"\"`."""
    lines, first = source
    strings = [
        token
        for token in tokenize.generate_tokens(io.StringIO("".join(lines)).readline)
        if token.type == tokenize.STRING and token.string.startswith('"""')
    ]
    begin, end = (strings[0].start[0], strings[0].end[0]) if strings else (0, -1)
    answer = []
    for i, text in enumerate(lines, start=1):
        if i == begin:
            answer.append((first + i - 1, text[: len(text) - len(text.lstrip())] + '"""..."""'))
        elif not begin < i <= end:
            answer.append((first + i - 1, text.rstrip("\n")))
    return answer
