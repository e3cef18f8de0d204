"""Rich's Console as every command uses it: text is text, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

import rich.console
from rich.segment import Segment

from ...extras.plain_text import plain


class Console(rich.console.Console):
    """No markup and no emoji codes: a `[name]` in a path stays. All text is made plain before it is laid out in lines.

    Settings are Rich's.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    @property
    def file(self) -> IO[str]:
        """Past the stream that makes `print` plain, also while a progress bar has put its own in front of that."""
        file = super().file
        return getattr(file, "rich_proxied_file", file)

    @file.setter
    def file(self, file: IO[str]) -> None:
        self._file = file

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
