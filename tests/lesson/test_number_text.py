"""Numbers as people type them."""

from __future__ import annotations

import pytest

from paged_ref.lesson.number_text import parse_number


@pytest.mark.parametrize(
    ("typed", "value"),
    [("27", 27), (" 1,000 ", 1000), ("2*3*8", 48), ("2.5e6", 2.5e6), ("-(4+1)/2", -2.5), ("50%", 0.5), ("7//2", 3)],
)
def test_numbers_as_people_type_them(typed: str, value: float) -> None:
    assert parse_number(typed) == value


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "many",
        "2**9999",
        "1/0",
        "__import__('os')",
        "[1]",
        "True",
        "(" * 300,
        "1e999*0j",
        "1e400",
        "-1e308*10",
        "1e400*0",
    ],
)
def test_what_is_no_number(typed: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        parse_number(typed)
