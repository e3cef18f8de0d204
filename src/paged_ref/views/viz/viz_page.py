"""The runs of `paged-ref viz` as one page: each event in each frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...timeline.history import History
from ...timeline.marks import MARKS
from ..common.printing import Size
from ..page.page import Labels, Page, Story, StoryFrame
from .frames.screen import frames_of, step_of
from .narration import address, narrate
from .player import SIGNS
from .scene import Scene
from .source_links import function_for_event, place_of

MOST = 10_000  # events: two minutes of drawing, and 2 MB
FEWER = 6  # lines that a frame has fewer than the window of a terminal: title, sentence and keys stand around it


def write_page(
    path: Path, runs: Sequence[History], frame: int, at: int, size: Size | None, made_with: str | None = None
) -> None:
    """The page opens at event `at` (from 0) of the first run; `made_with` as in `Page`.

    Raises ValueError where the page cannot be written.
    """
    if (total := sum(map(len, runs))) > MOST:
        raise ValueError(f"--html: {total:,} events are in the log; at most {MOST:,} fit on a page")
    width, height = size or (100, 30)
    model = f" of {runs[0].model}" if runs[0].model else ""
    used = {mark for run in runs for _, mark in run.marks}
    labels = Labels(
        f"The memory{model}, event by event", "manager", "event", "step", "highlight",
        {mark: what for mark, what in MARKS.items() if mark in used},
        notes=[(sign.split(" ")[0], sign.split(" ", 1)[1]) for _, signs in SIGNS[:-1] for sign in signs],
    )  # fmt: skip
    page = Page(labels, width, height - FEWER, made_with)
    page.start = {"run": 0, "frame": frame, "position": at}
    for run in runs:
        frames = frames_of(run)
        manager = run.opened.manager
        same = sum(story.name.split()[0] == manager for story in page.runs)  # earlier runs under this manager
        name = f"{manager} {same + 1}" if same else manager
        of_frames = [StoryFrame(each.name, list(each.about)) for each in frames]
        page.runs.append(Story(name, of_frames, run.step_positions, run.marks))
        for position in range(len(run)):
            moment = run.moment(position)
            scene = Scene(moment, runs, hints=False)
            drawn = [each.draw(scene, width, height - FEWER) for each in frames]
            place = place_of(function_for_event(moment))
            source = f"{place.file}:{place.line} {place.name}", "\n".join(place.source)
            sentence = f"{narrate(moment)}\n{address(moment)}".rstrip()
            page.add(drawn, step_of(moment), sentence, source)
    page.write(path)
