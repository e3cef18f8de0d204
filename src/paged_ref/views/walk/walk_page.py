"""The kernel walk as one page: each access of both kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..common.printing import Size
from ..page.page import Labels, Page, Story, StoryFrame
from .call import KERNELS, Walk
from .captions import sentence
from .frames import GLOSSARY, MARKS, VIEWS, Look, picture, where

MOST = 5_000  # accesses: two minutes of drawing, and 1 MB


def write_page(path: Path, walk: Walk, at: int, look: Look, size: Size | None) -> None:
    """The page opens at access `at` (from 0). Raises ValueError where it cannot be written."""
    if len(walk) > MOST:
        raise ValueError(f"--html: the call makes {len(walk):,} accesses; at most {MOST:,} fit on a page")
    width, height = size or (100, 40)
    marks = {info.name: f"first access to {info.name}" for run in walk.runs.values() for info in run.trace.arrays}
    labels = Labels(
        "The attention kernels, access by access", "kernel", "access", "line", "array", marks, first_step=1,
        notes=[*MARKS, *GLOSSARY],
    )  # fmt: skip
    page = Page(labels, width, height - 6)
    names = [name for name in KERNELS if name in walk.runs]  # a reader's own kernel has no naive one beside it
    first = "naive" if look.kernel == "naive" else "paged"
    page.start = {"run": names.index(first), "frame": VIEWS.index(look.view), "position": at}
    looks = [Look(view=view, keys=False) for view in VIEWS]
    for name in names:
        run = walk.runs[name]
        tour = [(position, run.info(position).name) for position in run.tour()]
        frames = [StoryFrame(view, list(marks)) for view in VIEWS]
        page.runs.append(Story(name, frames, run.starts["line"].tolist(), tour))
        for position in range(len(run)):
            views = [picture(walk, position, width, height - 6, replace(each, kernel=name)) for each in looks]
            page.add(views, where(run, position), sentence(run, position))
    page.write(path)
