"""The frames of the kernel walk: pure functions from (walk, position, width, height) to lines of text.

80x24 shows source, cache and the access. From 100x30 on the counters and the layouts, too. From 140 columns on
naive and paged stand side by side. Marks and letters say everything; colour only repeats it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text

from ..common.canvas import DIM, TITLE, Lines, beside, filled, fit, line, page, rule, too_small, wrap
from .call import Walk
from .captions import sentence
from .counts import counters, layouts, thread_line
from .kernel_run import KernelRun
from .panels import NOW, caches, cell_width, grid_height, now, source
from .sizes import LETTERS

SMALLEST = (60, 20)
WIDE = 140  # columns from which both kernels fit side by side
VIEWS = ("walk", "threads", "layouts")
KEYS = (
    ("→ ←", "the next, the previous access"),
    ("↓ ↑", "the next, the previous line that touches memory"),
    ("t T", "the next, the previous thread"),
    ("n p", "the next, the previous round (a round lies between two barriers)"),
    ("b B", "the next, the previous CUDA block: another head or another sequence"),
    ("Home End", "the first, the last access"),
    ("space", "play; any key stops it"),
    ("k", "naive, paged, or both side by side"),
    ("1 2 3", "all, the counters of the threads, the layouts"),
    ("?", "this help"),
)
MARKS = (
    ("▶", "the line, the thread, the element of the moment"),
    ("≠", "a line that differs in the other kernel: all that paging changes"),
    ("A4", "the slot of token 4 of sequence A;  A_ is A's and empty;  . is free"),
    ("[A4]", "this thread reads it now"),
    ("(A4)", "other lanes of the warp read it in the same load"),
    ("k K", "some, all of the slot's K has been read by this CUDA block"),
    ("v V", "some, all of the slot's V"),
    ("■ □ ·", "elements that this thread, that others, that no thread used so far"),
    ("12+3w", "12 reads and 3 writes"),
)


GLOSSARY = (
    ("warp", "32 threads of a CUDA block that run the same instruction together"),
    ("lane", "one thread of a warp; the lanes of a warp load together"),
    ("sector", "32 bytes of global memory in a row: the least that a load moves"),
    ("used", "the share of the bytes in the sectors that the lanes asked for"),
    ("round", "what the threads do between two barriers"),
    ("4 B a lane", "each lane loads one element: the bytes for a lane are its size"),
    ("16 B a lane", "each lane loads 16 bytes in one instruction, the most there is"),
    ("NHD, HND", "the axes of a block in memory: N slots, H heads, D elements"),
    ("packed", "neighbouring slots lie side by side, 16 bytes of each"),
    ("shared", "memory on the chip that all threads of a CUDA block see"),
    ("tile", "the keys that the threads look at together, one for each thread"),
)


@dataclass(frozen=True, slots=True)
class Look:
    """How the viewer looks at the walk."""

    kernel: str = "both"  # or naive, paged
    view: str = "walk"
    playing: bool = False
    keys: bool = True  # show the keys; a printed frame has none


def frame(walk: Walk, position: int, width: int, height: int, look: Look | None = None) -> Text:
    """The whole screen at one moment: exactly `height` lines of at most `width` cells."""
    look = look or Look()
    if (small := too_small(width, height, SMALLEST)) is not None:
        return small
    run = shown_run(walk, look)
    runs = list(walk.runs.values()) if _both(width, look) else [run]
    why = _why(runs, position, width)
    lines = [*picture(walk, position, width, height - 2 - len(why), look), *why]
    head, foot = _title(walk, run, position, width, look), _footer(width, look)
    return page([head, *filled(lines, height - 2), foot], width, height)


def picture(walk: Walk, position: int, width: int, height: int, look: Look) -> Lines:
    """A frame without its title, its sentence and its keys."""
    run = shown_run(walk, look)
    if look.view == "threads":
        return filled(counters(run, position, width, height), height)
    if look.view == "layouts":
        return filled(layouts(run, position, width, height), height)
    if _both(width, look):
        return _side_by_side(walk, position, width, height)
    draw = _everything if width >= 100 and height >= 24 else _essentials
    return draw(run, position, width, height)


def shown_run(walk: Walk, look: Look) -> KernelRun:
    return walk.runs["naive" if look.kernel == "naive" else "paged"]


def _both(width: int, look: Look) -> bool:
    """Both kernels, side by side."""
    return look.view == "walk" and look.kernel == "both" and width >= WIDE


# ---- the arrangements


def _essentials(run: KernelRun, position: int, width: int, height: int) -> Lines:
    below = [rule("now", width), *now(run, position, width), *thread_line(run, position, width)]
    right = max(36, min(5 + run.sizes.block_size * cell_width(run), width // 2))
    return [*_code_and_cache(run, position, width, right, height - len(below), brief=True), *below]


def _everything(run: KernelRun, position: int, width: int, height: int) -> Lines:
    right = 40 if width < 120 else min(60, width * 2 // 5)
    panel = 15 if height >= 34 else 9  # 15: each array has a line of its own
    top = _code_and_cache(run, position, width, right, height - panel - 4, brief=width < 200)
    return [*top, rule("now", width), *now(run, position, width), *_panels(run, position, width, right, panel)]


def _code_and_cache(run: KernelRun, position: int, width: int, right: int, height: int, brief: bool) -> Lines:
    left = width - right - 1
    code = source(run, position, left, height, brief=brief)
    return filled(beside(code, caches(run, position, right, height), left), height)


def _panels(run: KernelRun, position: int, width: int, right: int, height: int, gap: int = 1) -> Lines:
    left = width - right - gap
    panels = beside(counters(run, position, left, height), layouts(run, position, right, height), left, gap)
    return filled(panels, height)


def _side_by_side(walk: Walk, position: int, width: int, height: int) -> Lines:
    left = (width - 3) // 2
    panel = max(0, min(15, (height - 20) * 2 // 3))
    room = height - panel - 4
    grid = min(room // 2, 3 + grid_height(walk.runs["paged"], left))
    columns: list[Lines] = []
    for run in walk.runs.values():
        code = source(run, position, left, room - grid - 1, brief=left < 100, other=False)
        cache = filled(caches(run, position, left, grid), grid)
        top = [rule(run.code.file, left), *filled(code, room - grid - 1), *cache]
        columns.append([*top, rule("now", left), *now(run, position, left)])
    panels = _panels(walk.runs["paged"], position, width, width - left - 3, panel, gap=3)
    return [*beside(columns[0], columns[1], left, 3), *panels]


# ---- title, words, keys


def _title(walk: Walk, run: KernelRun, position: int, width: int, look: Look) -> Text:
    name = "naive.py and paged.py" if _both(width, look) else run.code.file
    count = f"{position + 1}/{len(walk)}"
    rest, room = where(run, position), width - len(name) - len(count) - 5
    if len(rest) > room:
        rest = rest.replace("CUDA block", "block").replace("sequence ", "")
    gap = " " * max(1, room - len(rest))
    return line((f" {name} ", NOW), f" {fit(rest, min(len(rest), room))}{gap}", (count, TITLE), " ")


def where(run: KernelRun, position: int) -> str:
    """The CUDA block, the round and the thread of an access."""
    access, block = run.access(position), int(run.trace.block[position])
    token, head, _ = access.block
    return (
        f"CUDA block {block + 1}/{run.trace.num_blocks}: sequence {LETTERS[token]}, head {head} │ "
        f"round {access.round + 1}/{run.rounds(position)} │ thread {access.thread}"
    )


def _footer(width: int, look: Look) -> Text:
    if look.playing or not look.keys:
        return line(("playing; any key stops" if look.keys else "", DIM))
    text = "←→ access ↑↓ line t thread n round b block │ k kernel 1 2 3 view ? help q quit"
    if width >= 110:
        text = "←→ access  ↑↓ line  t/T thread  n/p round  b/B CUDA block  space play "
        text += "│ k kernel  1 2 3 view  ? help  q quit"
    elif width < 80:
        text = "←→ access ↑↓ line t thread n round k kernel ? help q quit"
    return line((fit(text, width), DIM))


def _why(runs: list[KernelRun], position: int, width: int) -> Lines:
    """A heading, and three lines: what the thread does, of each kernel where the two differ."""
    texts = [sentence(run, position) for run in runs]
    if len(set(texts)) > 1:
        differ = any(int(run.line[position]) in run.code.different for run in runs)
        texts = [f"{run.name}: {text}" for run, text in zip(runs, texts, strict=True)] if differ else texts[1:]
    rows = [line(" " + row) for text in dict.fromkeys(texts) for row in wrap(text, width - 2)]
    return [rule("why", width), *filled(rows, 3)]
