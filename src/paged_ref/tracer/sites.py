"""Places in the code of a traced kernel, each as one number: its function, and the instruction in the function."""

from __future__ import annotations

import dis
from functools import cache
from types import CodeType, FrameType
from typing import Any

BITS = 20  # of the instruction's offset; the function's number stands above


class Sites:
    """The sites of one launch. An access only asks for its number; file, line and variable are found later."""

    def __init__(self) -> None:
        self._codes: list[CodeType] = []  # of each function
        self._sites: dict[int, list[int]] = {}  # by id(code): the site of every two bytes of it

    def of(self, frame: FrameType) -> int:
        """The site where `frame` stands."""
        sites = self._sites.get(id(frame.f_code))
        if sites is None:
            self._codes.append(frame.f_code)
            first = len(self._codes) - 1 << BITS
            sites = self._sites[id(frame.f_code)] = [first | place for place in _places(frame.f_code)]
        return sites[frame.f_lasti // 2]

    def file(self, site: int) -> str:
        return self._codes[site >> BITS].co_filename

    def line(self, site: int) -> int:
        return _lines(self._codes[site >> BITS])[(site & (1 << BITS) - 1) // 2]

    def variable(self, site: int) -> str:
        """The variable in which the result of the call at this site is stored."""
        for step in dis.get_instructions(self._codes[site >> BITS]):
            if step.offset > site & (1 << BITS) - 1 and step.opname.startswith("STORE"):
                return step.argval[0] if isinstance(step.argval, tuple) else str(step.argval)
        return "array"


@cache
def _lines(code: CodeType) -> list[int]:
    """The source line of each instruction."""
    return [position[0] or 0 for position in code.co_positions()]


@cache
def _places(code: CodeType) -> list[int]:
    """For each two bytes of the code, the offset that stands for their place in the source.

    A frame's own offset is not enough: once Python has specialised an instruction, the frame may stand at
    its end, and the compiler may have copied one call of the source into two branches.
    """
    steps = {step.offset: step for step in dis.get_instructions(code)}
    places: list[int] = []
    first: dict[Any, int] = {}
    for offset in range(0, len(code.co_code), 2):
        step = steps.get(offset)
        if step is None:  # inside an instruction
            places.append(places[-1])
        elif step.positions is None or step.positions.col_offset is None:  # Python runs without columns
            places.append(offset)
        else:
            places.append(first.setdefault((step.opname, step.positions), offset))
    return places
