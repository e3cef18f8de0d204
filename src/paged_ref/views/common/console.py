"""Rich's Console as every command uses it: markup in a text is a part of the text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment
from rich.text import Text

from ...extras.plain_text import plain


class Console(rich.console.Console):
    """No markup and no emoji codes: a `[name]` in a path stays. All text is made plain before it is laid out in lines.

    Settings are Rich's.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def set_live(self, live: Any) -> Any:
        """Rich would put a stream in front of standard output that follows escape sequences in what is printed."""
        live._redirect_stdout = live._redirect_stderr = False
        return super().set_live(live)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(plain(text, lines=True), **settings)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(plain(segment.text, lines=True), segment.style)

    def on_broken_pipe(self) -> None:
        raise
