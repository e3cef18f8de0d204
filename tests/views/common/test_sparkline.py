"""Sparklines: the highest value as high as a cell, and zeros that look unlike small values."""

from __future__ import annotations

from paged_ref.views.common.sparkline import LEVELS, sparkline


def test_sparkline() -> None:
    assert sparkline([0, 4, 8], 9) == LEVELS[0] + LEVELS[4] + LEVELS[7]
    assert sparkline([1, 2, 3, 4], 2) == LEVELS[6] + LEVELS[7]
    assert sparkline([], 5) == sparkline([1], 0) == ""
    assert sparkline([0, 0], 5) == LEVELS[0] * 2


def test_blank_cells_are_zeros_and_nothing_else() -> None:
    assert sparkline([0, 1, 4, 8, 1e-6], 9, blank=True) == " " + LEVELS[0] + LEVELS[3] + LEVELS[7] + LEVELS[0]
    assert sparkline([0, 2], 9, highest=4, blank=True) == " " + LEVELS[3]
