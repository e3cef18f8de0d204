"""A forest as rows of text: the strokes before each node, and the node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Node = TypeVar("Node")
DEEPEST_CHAIN = 4  # levels that a chain of only children is indented


def forest(
    roots: Iterable[Node], children: Callable[[Node], Sequence[Node]], *, indent_only_child: bool
) -> list[tuple[str, Node]]:
    """Each node after its parent, with the strokes that lead to the node.

    An only child stands in its parent's column, or, with `indent_only_child`, one level deeper.
    """
    rows: list[tuple[str, Node]] = []
    for root in roots:
        stack = [("", "", root)]  # strokes before the node, strokes of the levels below it, node
        while stack:  # no recursion: a branch may have thousands of nodes
            strokes, below, node = stack.pop()
            rows.append((strokes, node))
            following = children(node)
            only = len(following) == 1
            if only and not indent_only_child:
                stack.append((below, below, following[0]))
                continue
            flat = only and not below.strip() and len(below) >= 2 * DEEPEST_CHAIN
            for child in reversed(following):
                last = child is following[-1]
                deeper = "" if flat else "  " if last else "│ "
                stack.append((below + ("└─" if last else "├─"), below + deeper, child))
    return rows
