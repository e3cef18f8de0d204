"""A whole screen: the title, a frame, the sentence that explains it, the code that did it, and the keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.text import Text

from ....timeline.history import History, Moment
from ...common.canvas import DIM, Lines, beside, filled, fit, line, page, rule, title_line, too_small, wrap
from ...common.printing import Size
from ..narration import address, narrate
from ..scene import Scene, colour, in_order
from ..source_links import function_for_event, place_of
from . import attention, memory, prefix, residency, sharing, swap, tables, timeline

SMALLEST: Size = (60, 16)


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture of the state: its name, how to draw it, and the marks of the events that it is about."""

    name: str
    draw: Callable[[Scene, int, int], Lines]
    about: str  # letters of History.marks


FRAMES = (
    Frame("tables", tables.draw, "FCSREHX"),
    Frame("sharing", sharing.draw, "FCB"),
    Frame("swap", swap.draw, "SR"),
    Frame("prefix", prefix.draw, "HE"),
    Frame("memory", memory.draw, "FCSREHX"),
    Frame("timeline", timeline.draw, "SRXN"),
)
# Of a run whose pages stream in and out: it has no block tables that all layers share.
FRAMES_OF_PAGES = (
    Frame("residency", residency.draw, "AXN"),
    Frame("attention", attention.draw, "A"),
    Frame("timeline", timeline.draw, "XN"),
)


def frames_of(run: History) -> tuple[Frame, ...]:
    return FRAMES_OF_PAGES if run.opened.manager == "streaming" else FRAMES


def screen(scene: Scene, frame: int, width: int, height: int) -> Text:
    """Frame `frame` (from 0) in exactly `width` x `height` cells."""
    if (small := too_small(width, height, SMALLEST)) is not None:
        return small
    frames = frames_of(scene.history)
    frame = min(frame, len(frames) - 1)
    head = [_title(scene, width), _tabs(frames, frame, width)]
    foot = _foot(scene, width, 3 if height >= 22 else 2)
    room = height - len(head) - len(foot)
    body: Lines
    if width >= 140:
        side = min(76, width * 2 // 5)
        left = _stacked(scene, frame, width - side - 2, room)
        body = beside(left, _side(scene, side, room), width - side - 2, gap=2)
    elif height >= 44:
        body = filled(frames[frame].draw(scene, width, room - 14), room - 14) + _code(scene, width, 14)
    else:
        body = frames[frame].draw(scene, width, room)
        while body and not body[-1].plain.strip():
            body.pop()
        if room - len(body) >= 5:
            body += [line(""), *_texts(scene, width, room - len(body) - 1)]
    return page([*head, *filled(body, room), *foot], width, height)


def _stacked(scene: Scene, frame: int, width: int, height: int) -> Lines:
    """The frame; in a tall window the timeline below it, or the tables below the timeline."""
    frames = frames_of(scene.history)
    if height < 36:
        return frames[frame].draw(scene, width, height)
    below = 16
    second = frames[0].draw if frames[frame].draw is timeline.draw else timeline.draw
    above = height - below - 1
    return [*filled(frames[frame].draw(scene, width, above), above), line(""), *second(scene, width, below)]


# --- above the frame --------------------------------------------------------------------------------------


def step_of(moment: Moment) -> str:
    return f"step {moment.state.plan.step}" if moment.state.plan else "no step yet"


def _title(scene: Scene, width: int) -> Text:
    moment, history = scene.moment, scene.history
    parts = [f"{moment.state.memory.manager} manager"]
    if history.model:
        parts.append(history.model)
    if len(scene.runs) > 1:
        parts.append(f"run {scene.run + 1}/{len(scene.runs)}")
    if any(run.cut_off for run in scene.runs):
        parts.insert(0, "log cut off")  # first, so that a narrow window has it
    right = f"  {step_of(moment)}, event {moment.position + 1:,} of {len(history):,} "
    return title_line(parts, right, width)


def _tabs(frames: tuple[Frame, ...], frame: int, width: int) -> Text:
    row, wide = line(" " if width >= 72 else ""), width >= 72
    for i, each in enumerate(frames):
        name = f"{i + 1} {each.name}"
        row.append(f"[{name}]" if i == frame else f" {name} " if wide else name, "bold" if i == frame else DIM)
        row.append("  " if wide else " ")
    return row


# --- below it ---------------------------------------------------------------------------------------------


def _foot(scene: Scene, width: int, room: int) -> Lines:
    moment = scene.moment
    place = place_of(function_for_event(moment))
    where = address(moment, scene.selected)
    said = wrap(narrate(moment), width - 2)
    if where and len(wrap(where, width - 2)) + len(said) <= room:
        said += wrap(where, width - 2)
    if len(said) > room:
        said = [*said[: room - 1], fit(" ".join(said[room - 1 :]), width - 2)]
    name = type(moment.event).__name__
    did = line(" ", (f"{place.file}:{place.line}", "underline"), " ", place.name, (f" ({name})", DIM))
    rows = [rule("What happened, and why", width)]
    rows += filled([line(" ", (row, "bold")) for row in said], room)
    rows += [did, _scrubber(scene, width)]
    if scene.message:
        rows.append(line((" " + scene.message, "bold")))
    elif scene.hints:
        rows.append(_keys(scene, width))
    return rows


def _scrubber(scene: Scene, width: int) -> Text:
    """The whole log in one line: letters where ownership changed, and where we are."""
    history = scene.history
    cells = ["─"] * (width - 2)
    last = max(1, len(history) - 1)
    for position, mark in reversed(history.marks):
        if mark not in "BN":
            cells[position * (len(cells) - 1) // last] = mark
    here = scene.moment.position * (len(cells) - 1) // last
    return line(" ", ("".join(cells[:here]), ""), ("●", "bold"), ("".join(cells[here + 1 :]), DIM))


def _keys(scene: Scene, width: int) -> Text:
    play = "pause" if scene.playing else "play"
    numbers = f"1-{len(frames_of(scene.history))}"
    keys = [
        ("←→", "event"), ("↑↓", "step"), ("n/p", "what this frame is about"), ("space", play), (numbers, "frame"),
        ("tab", "run") if len(scene.runs) > 1 else ("/", "find"), ("?", "help"), ("q", "quit"),
    ]  # fmt: skip
    if width < 96:
        keys[2] = ("n/p", "next like this")
    if width < 80:
        keys = [keys[0], keys[1], ("n/p", "next"), keys[4], *keys[-2:]]
    row = line(" ")
    for key, what in keys:
        row.append(key, "bold")
        row.append(f" {what}  " if width > 88 else f" {what} ", DIM)
    return row


# --- next to it, where there is room -------------------------------------------------------------------------


def _side(scene: Scene, width: int, height: int) -> Lines:
    """The function that did it, and what has been written so far."""
    texts = _texts(scene, width, height - 8)
    room = max(8, height - len(texts))
    return [*filled(_code(scene, width, room), room), *texts][:height]


def _code(scene: Scene, width: int, height: int) -> Lines:
    place = place_of(function_for_event(scene.moment))
    rows = [rule("The code that did it", width, f"{place.file.rsplit('/', 1)[-1]}:{place.line}")]
    for number, text in enumerate(place.source[: height - 1]):
        left = len(place.source) - number
        more = number == height - 2 and left > 1
        shown = f"… {left} more lines" if more else text
        rows.append(line((f"{place.line + number:>5} ", DIM), fit(shown, width - 6)))
    return rows


def _texts(scene: Scene, width: int, height: int) -> Lines:
    """Each sequence's tokens as text, the generated ones after a bar: those that run first, as many as fit."""
    moment = scene.moment
    rows = [rule("The texts so far", width)]
    order = in_order(moment, finished=True)
    about = [s for s in (scene.selected, *moment.change.seq_ids) if s in order]
    for number, seq_id in enumerate(dict.fromkeys([*about[:1], *order])):
        text = _text(moment, seq_id, width)
        left = len(order) - number
        if len(rows) + len(text) + (left > 1) > height:
            return [*rows, line((f" … {left} more", "bold"))]
        rows += text
    return rows


def _text(moment: Moment, seq_id: int, width: int) -> Lines:
    """One sequence in at most three lines: its beginning, and its end where all is too long."""
    view, name, style = moment.state.sequences[seq_id], moment.history.name(seq_id), colour(moment, seq_id)
    parts = (view.tokens[: view.prompt_len], view.tokens[view.prompt_len :])
    text = "‖".join("".join(map(moment.history.text, part)) for part in parts)
    said = wrap(text.replace("·", " ").strip(), width - 8)
    if len(said) > 3:
        said = [said[0] + " …", *said[-2:]]
    return [
        line((f"{name if i == 0 else '':<5} ", f"{style} bold"), (row, style)) for i, row in enumerate(said or [""])
    ]
