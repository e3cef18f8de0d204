"""Text from outside, as it may stand on a screen, in a picture, in a metric or in a message: shown, and nothing more.

Prompts, tokens, names, paths and logs may hold characters that move the cursor, clear the screen, turn the writing
direction or have no width. Output goes through `plain` where it enters a screen (views/common/streams.py and
console.py), so no command calls it for a print.
"""

from __future__ import annotations

import unicodedata

SIGN = "\N{REPLACEMENT CHARACTER}"
_CONTROL_PICTURES = 0x2400  # ␀ to ␟: a visible sign for each of the first 32 characters
# Controls; signs without a width (bidi marks, joiners, tags); halves of characters; line and paragraph separators.
_DRIVING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


class _Signs(dict[int, str]):
    """What each character is shown as, found when it is first met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if code < 0x20:
            character = chr(_CONTROL_PICTURES + code)
        elif unicodedata.category(character) in _DRIVING or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF:
            character = SIGN  # the last two: no characters, and not allowed in XML
        self[code] = character
        return character


_line, _lines = _Signs(), _Signs({ord("\n"): "\n", ord("\t"): "\t"})


def plain(text: str, *, lines: bool = False) -> str:
    """`text` with a visible sign in place of each character that could drive a terminal, one for one.

    `lines`: line breaks and tabs stay.
    """
    return text if text.isprintable() else text.translate(_lines if lines else _line)
