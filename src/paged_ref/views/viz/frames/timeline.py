"""Frame 6: the batch over time. A row for each sequence, a column for each step."""

from __future__ import annotations

from rich.text import Text

from ....core.checks import plural
from ...common.canvas import DIM, Lines, filled, fit, line, pack, rule, window
from ..scene import Scene, colour, prose

CODES = {
    "P": "prefill",
    "d": "decode",
    "R": "computed again",
    "S": "swapped out",
    "s": "on the host",
    "x": "preempted by recompute",
    "w": "waits",
    "-": "idle",
    "F": "finished",
}
_SHOWN = {"w": "."}  # in place of the code
_STYLES = {**dict.fromkeys("PRF", "bold"), **dict.fromkeys("Sx", "bold reverse"), **dict.fromkeys("ws-", DIM)}


def draw(scene: Scene, width: int, height: int) -> Lines:
    moment, history = scene.moment, scene.history
    now, total = moment.step, len(history.steps)
    legend = _legend(scene, width)
    batch = _batch(scene, width, max(4, min(10, height - 3 - len(legend) - len(history.names))))
    label = 24 if width < 110 else 40
    columns = width - label - 1
    wide = 3 if 3 * (total + 1) <= columns else 2 if 2 * (total + 1) <= columns else 1
    first_step, last_step = window(total + 1, columns // wide, max(0, now))
    seq_ids = sorted(history.names)
    room = height - 3 - len(legend) - len(batch)
    concerned = next((s for s in (scene.selected, *moment.change.seq_ids) if s is not None), None)
    wanted = seq_ids.index(concerned) if concerned in history.names else 0
    first, last = window(len(seq_ids), room, wanted + scene.scroll)
    note = f"sequences {first + 1}-{last} of {len(seq_ids)}" if len(seq_ids) > room else plural(total, "step")
    rows = [
        rule("What each sequence did in each step", width, note),
        _scale(label, wide, first_step, last_step),
        *(_row(scene, seq_id, label, wide, first_step, last_step) for seq_id in seq_ids[first:last]),
        _here(now, label + 1 + (max(0, now) - first_step) * wide, width),
    ]
    return [*filled(rows, height - len(batch) - len(legend)), *batch, *legend]


def _here(now: int, column: int, width: int) -> Text:
    """The mark below the step of the moment, its number on the side that has room."""
    number = f"step {now}" if now >= 0 else ""
    if column + 2 + len(number) > width:
        return line(" " * (column - len(number) - 1), (f"{number} ▲", "bold"))
    return line(" " * column, (f"▲ {number}", "bold"))


def _scale(label: int, wide: int, first: int, last: int) -> Text:
    every = 10 if wide == 1 else 5
    row = [" "] * ((last - first) * wide + 6)
    for step in range(first, last):
        if step % every == 0:
            at = (step - first) * wide
            row[at : at + len(str(step))] = str(step)
    return line((" " * (label + 1) + "".join(row).rstrip(), DIM))


def _row(scene: Scene, seq_id: int, label: int, wide: int, first: int, last: int) -> Text:
    moment, history = scene.moment, scene.history
    view = moment.state.sequences.get(seq_id)
    style = colour(moment, seq_id)
    pointer = "▶" if seq_id == scene.selected else "*" if seq_id in moment.change.seq_ids else " "
    text = prose(history, view.tokens[: view.prompt_len]) if view else ""
    name = fit(history.name(seq_id), 4)
    row = line((pointer, "bold"), (name, f"{style} bold"), (fit(text, label - 6) + " ", style if view else DIM))
    row.append("│", DIM)
    for step in range(first, last):
        code = history.spans.code_at(seq_id, step)
        future = step > moment.step
        shown = fit(_SHOWN.get(code, code), wide)
        row.append(shown, DIM if future else _STYLES.get(code, style))
    return row


def _batch(scene: Scene, width: int, height: int) -> Lines:
    """The last step's batch, and what each sequence has written."""
    moment = scene.moment
    plan = moment.state.plan
    if plan is None:
        return [rule("The batch", width), line((" No step is planned yet.", DIM))]
    total = sum(n for _, n in plan.chunks)
    note = f"{plural(total, 'token')}, {plural(len(plan.chunks), 'sequence')}"
    rows = [rule(f"The batch of step {plan.step}", width, note)]
    for seq_id, n in plan.chunks[: height - 1]:
        view = moment.state.sequences[seq_id]
        code = moment.history.spans.code_at(seq_id, moment.step)
        style = colour(moment, seq_id)
        text = prose(moment.history, view.tokens)
        head = f" {moment.history.name(seq_id):<4}{CODES.get(code, '')} {n}: "
        room = width - len(head) - 1
        rows.append(line((head, f"{style} bold"), (text if len(text) <= room else "…" + text[1 - room :], style)))
    left = len(plan.chunks) - (height - 1)
    if left > 0:
        rows[-1] = line((f" … and {left + 1} more", DIM))
    return rows


def _legend(scene: Scene, width: int) -> Lines:
    used = scene.history.spans.codes()
    shown = [f"{_SHOWN.get(code, code)} {what}" for code, what in CODES.items() if code in used]
    return [line((f" {row}", DIM)) for row in pack(shown, width - 2)]
