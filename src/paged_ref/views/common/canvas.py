"""Lines of text of a fixed width: what every frame is made of.

A frame is a list of Rich `Text` lines. Letters and marks carry the meaning; colour only repeats it. Widths
are counted in cells of the terminal, since a token may be two cells wide.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from ...core.checks import plural
from ...extras.plain_text import plain

Lines = list[Text]

# One colour for each request, in turn. Of the 256 colours of a terminal these are as far from white as from black.
COLOURS = (
    "turquoise4", "green4", "medium_orchid3", "chartreuse4", "dodger_blue2", "red1", "medium_purple3",
    "pale_turquoise4",
)  # fmt: skip
DIM = "dim"
NEW = "bold reverse"
TITLE = "bold"
WARM = "deep_pink3"


def fit(text: str, width: int) -> str:
    """`text` in exactly `width` cells: filled with spaces, or cut with an ellipsis."""
    if width <= 0:
        return ""
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    return set_cell_size(text, width - 1) + "…"


def line(*parts: str | tuple[str, str]) -> Text:
    """A line of plain and of styled (text, style) parts."""
    return Text.assemble(*parts, no_wrap=True)


def rule(title: str, width: int, note: str = "") -> Text:
    """A heading: `── title ──── note ──`."""
    if note and cell_len(title) + cell_len(note) + 8 > width:
        title = title.split(":")[0]
        if (room := width - cell_len(note) - 8) >= 12:  # the note may count what is not shown: the title is cut first
            title = fit(title, min(cell_len(title), room))
    head = f"── {title} "
    if note and cell_len(head) + cell_len(note) + 4 <= width:
        fill = "─" * (width - cell_len(head) - cell_len(note) - 4)
        return line(("── ", DIM), (title, TITLE), (f" {fill} ", DIM), note, (" ──", DIM))
    if cell_len(head) > width:
        return line((fit(title, width), TITLE))
    return line(("── ", DIM), (title, TITLE), (" " + "─" * (width - cell_len(head)), DIM))


def exactly(text: Text, width: int) -> Text:
    """A line of plain text, cut or filled to `width` cells. Every line of a frame passes here."""
    fixed = text.copy()
    fixed.plain = plain(text.plain)
    if fixed.cell_len > width:
        fixed.truncate(width, overflow="ellipsis")
    fixed.pad_right(width - fixed.cell_len)
    return fixed


def filled(rows: Lines, height: int) -> Lines:
    """Exactly `height` lines: the first of `rows`, then empty ones. Where rows do not fit, the last says how many."""
    left = len(rows) - height + 1
    if height > 0 and any(row.plain.strip() for row in rows[height:]):
        rows = [*rows[: height - 1], line((f" … {plural(left, 'more line')}", "bold"))]
    return (rows + [line("")] * (height - len(rows)))[: max(0, height)]


def page(rows: Lines, width: int, height: int) -> Text:
    """The rows as one text of exactly `width` x `height` cells."""
    return Text("\n", no_wrap=True).join(exactly(row, width) for row in filled(rows, height))


def title_line(parts: Sequence[str], right: str, width: int) -> Text:
    """The first line of a screen: the program, what is shown, and on the right where the viewer is."""
    return line((" paged_ref ", "bold reverse"), " ", fit(", ".join(parts), width - 12 - len(right)), (right, "bold"))


def too_small(width: int, height: int, smallest: tuple[int, int]) -> Text | None:
    """What a window shows that has fewer columns or rows than `smallest`; None for one that is large enough."""
    if width >= smallest[0] and height >= smallest[1]:
        return None
    needed = f"This window is {width}x{height}; at least {smallest[0]}x{smallest[1]} is needed. Enlarge it, or press q."
    return page([line(row) for row in wrap(needed, max(1, width))], width, height)


def beside(left: Lines, right: Lines, left_width: int, gap: int = 1) -> Lines:
    """Two columns of lines."""
    height = max(len(left), len(right))
    columns = zip(filled(left, height), filled(right, height), strict=True)
    return [exactly(one, left_width + gap).append_text(other) for one, other in columns]


def wrap(text: str, width: int) -> list[str]:
    """Words in lines of at most `width` cells."""
    rows, row = [], ""
    for word in text.split():
        if row and cell_len(row) + 1 + cell_len(word) > width:
            rows.append(row)
            row = word
        else:
            row = f"{row} {word}" if row else word
        while cell_len(row) > width:
            rows.append(set_cell_size(row, width))
            row = row[len(rows[-1]) :]
    return [*rows, row] if row else rows


def pack(items: Iterable[str], width: int) -> list[str]:
    """Items side by side, in as few lines as hold them whole."""
    rows: list[str] = []
    gap = "   "
    for item in items:
        if rows and cell_len(rows[-1]) + len(gap) + cell_len(item) <= width:
            rows[-1] += gap + item
        else:
            rows.append(item)
    return rows


def window(count: int, room: int, wanted: int) -> tuple[int, int]:
    """Which of `count` lines to show in `room`: all, or those around line `wanted`. The first, and the end."""
    first = max(0, min(wanted - room // 2, count - room))
    return first, min(count, first + room)


def listing(title: str, items: Iterable[object], width: int, total: int | None = None) -> Text:
    """A title, then as many items as fit, and how many more there are of `total` (default: of the items)."""
    shown = list(map(str, items))
    total = len(shown) if total is None else total
    if not shown:
        return line((title, TITLE), (" none", DIM))
    text = ""
    for fitting in range(len(shown), -1, -1):
        left = total - fitting
        text = "".join(f" {item}" for item in shown[:fitting]) + (f" … {left:,} more" if left else "")
        if cell_len(title) + cell_len(text) <= width:
            break
    return line((title, TITLE), text)


def in_words(names: Sequence[str]) -> str:
    """`A`, `A and B`, `A, B and C`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def size_of(num_bytes: int, least: int = 10) -> str:
    """A number of bytes in the largest unit of which there are at least `least`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= least * size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:,} bytes"


def brief(names: Sequence[str], width: int) -> str:
    """Names in `width` cells: all, or the first and how many more."""
    for shown in range(len(names), 0, -1):
        more = f"+{len(names) - shown}" if shown < len(names) else ""
        text = " ".join(names[:shown]) + more
        if len(text) <= width:
            return text
    return fit(f"{len(names)}", width)
