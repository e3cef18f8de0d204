"""What the player dims: code that only prepares or prints."""

from __future__ import annotations

import ast

from paged_ref.lesson.harness import harness_lines

CODE = '''"""A lesson."""
from paged_ref.kernels import slot_of
from paged_ref.lesson import break_it, check, claim, predict, table, todo
import numpy as np
SIZE = 4
guess = predict("How many?")                           # dim
table_of_blocks = [7, 1, 3]
slots = [slot_of(table_of_blocks, p, SIZE) for p in range(9)]
rows = []                                              # dim
for slot in slots:                                     # dim
    rows.append((slot, slot % SIZE))                   # dim
counts = len(slots)
def draw(text):                                        # dim
    table(text, ("slot", "offset"), rows)              # dim
draw("a table")                                        # dim
guess.grade(counts)                                    # dim
claim("all are there", counts, 9)
def one_more(real):
    return lambda *given: real(*given) + 1
break_it("one more", bug=one_more)                     # dim
def my_slot(position):
    return todo("1 line")
cases = [(3,), (4,)]                                   # dim
def spec(position):                                    # dim
    return slot_of([1], position, 4)                   # dim
check(my_slot, spec=spec, cases=cases, hint="")        # dim
'''


def test_code_that_only_prepares_or_prints_is_dim() -> None:
    dim = {number for number, line in enumerate(CODE.splitlines(), start=1) if line.endswith("# dim")}
    assert harness_lines(ast.parse(CODE)) == dim
