"""The memory bar and chart: each part as long as its share, nothing lost by rounding, marks that differ."""

from __future__ import annotations

import pytest

from paged_ref.core.memory.usage import MemoryUsage
from paged_ref.views.common.bars import PARTS, USAGE, amounts_of, bar, chart, legend, lengths, numbers

USED = MemoryUsage(tokens=6, reserved=2, internal=1, external=3, cached=0, free=4, shared=8)


def test_the_parts_are_those_of_the_usage_and_sum_to_the_pool() -> None:
    assert amounts_of(USED) == {"tokens": 6, "reserved": 2, "internal": 1, "external": 3, "cached": 0, "free": 4}
    assert sum(amounts_of(USED).values()) == USED.total
    for drawn in ([PARTS[part].mark for part in USAGE], [PARTS[part].shade for part in USAGE]):
        assert len(set(drawn)) == len(USAGE)


@pytest.mark.parametrize("cells", [1, 7, 16, 78, 1000])
def test_lengths_fill_the_bar(cells: int) -> None:
    amounts = (6, 2, 1, 3, 0, 4)
    found = lengths(amounts, 16, cells)
    assert sum(found) == cells
    assert all(abs(length - cells * amount / 16) <= 1 for length, amount in zip(found, amounts, strict=True))
    assert lengths((0, 0), 0, cells) == [0, 0]


def test_a_bar_in_marks_and_in_shades() -> None:
    assert bar(amounts_of(USED), 16, 16).plain == " ██████▒▒!xxx····"
    assert bar(amounts_of(USED), 16, 16, shaded=True).plain == " ██████▓▓▒░░░····"
    assert bar({"tokens": 0.5}, 1, 8).plain == " ████"


def test_a_chart_has_a_column_for_each_moment_from_the_bottom_up() -> None:
    columns = [{"tokens": 1, "free": 3}, {"tokens": 2, "empty": 1, "free": 1}]
    assert [row.plain for row in chart(columns, 4, 4)] == [" ····", " ··▒▒", " ··██", " ████"]
    assert [row.plain for row in chart(columns, 2, 4)] == [" ··", " ·▒", " ·█", " ██"]


def test_numbers_and_legend() -> None:
    assert numbers({"tokens": 3, "cached": 0, "free": 1}, 4).plain.split("  ") == [" █ 75 % tokens", "· 25 % free", ""]
    assert "c 0 % cached" in numbers({"cached": 0, "free": 4}, 4, zeros=True).plain
    assert "▒ 25 % reserved, used later" in numbers({"reserved": 1, "free": 3}, 4, labels=True).plain
    assert legend(["tokens", "free"]) == ["█ hold tokens", "· free"]
