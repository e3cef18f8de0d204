"""Forests as text."""

from __future__ import annotations

from paged_ref.views.common.trees import forest

CHILDREN = {"a": ["b", "f"], "b": ["c", "e"], "c": ["d"], "f": ["g"]}


def drawn(*, indent_only_child: bool) -> list[str]:
    rows = forest(["a", "x"], lambda node: CHILDREN.get(node, []), indent_only_child=indent_only_child)
    return [strokes + node for strokes, node in rows]


def test_an_only_child_stands_below_its_parent_or_one_level_deeper() -> None:
    assert drawn(indent_only_child=False) == ["a", "├─b", "│ ├─c", "│ │ d", "│ └─e", "└─f", "  g", "x"]
    assert drawn(indent_only_child=True) == ["a", "├─b", "│ ├─c", "│ │ └─d", "│ └─e", "└─f", "  └─g", "x"]


def test_a_long_chain_stays_narrow() -> None:
    for indent in (False, True):
        rows = forest([0], lambda node: [node + 1] if node < 5_000 else [], indent_only_child=indent)
        assert [node for _, node in rows] == list(range(5_001))
        assert max(len(strokes) for strokes, _ in rows) <= 10
