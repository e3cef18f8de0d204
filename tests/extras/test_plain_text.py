"""Foreign text: a sign for each character that could drive a terminal, one for one, and everything else as it is."""

from __future__ import annotations

import unicodedata

import pytest

from paged_ref.extras.plain_text import plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Four score", "Four score"),
        ("·日本語 ﷽ é", "·日本語 ﷽ é"),
        ("\x1b]0;PWNED\x07", "␛]0;PWNED␇"),
        ("a\x9b31mb\x85", "a�31mb�"),
        ("a\u202eb\u2066c\u200d\u200b\ufeff", "a�b�c���"),
        ("a\nb\tc\r", "a␊b␉c␍"),
        ("a\u2028b\u2029", "a�b�"),
        ("a\udcffb\ud800", "a�b�"),
        ("\x7f\x00\ufffe\U0001ffff\ufdd0", "�␀���"),
        ("nbsp\xa0", "nbsp\xa0"),
    ],
)
def test_what_drives_becomes_a_sign(text: str, shown: str) -> None:
    assert plain(text) == shown
    assert len(shown) == len(text)


def test_lines_may_stay() -> None:
    assert plain("a\n\tb\x1b\r\n", lines=True) == "a\n\tb␛␍\n"


def test_every_character_is_shown_by_one_that_drives_nothing() -> None:
    everything = "".join(map(chr, [*range(0x20000), *range(0xE0000, 0xE0200)]))
    shown = plain(everything)
    assert len(shown) == len(everything)
    assert not {unicodedata.category(c) for c in set(shown)} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert plain(shown) == shown
    shown.encode()
