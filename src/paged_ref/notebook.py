"""paged_ref in Jupyter. `import paged_ref` in a notebook calls `register`, and then:

* outputs, an LLM and a manager show themselves as HTML when a cell ends with them;
* `%paged_ref viz --at S` runs a command. What the command can write with `--html` is shown below the cell, to step
  through; of other commands the text is shown;
* `show(events)` is the visualizer on the events of `LLM(log=events.append)`.

Nothing below this file knows of HTML: IPython is told how to show the types.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .extras.plain_text import plain

if TYPE_CHECKING:
    from .core.engine.outputs import RequestOutput
    from .core.memory.paged import PagedManager
    from .llm import LLM
    from .timeline.events import Event

WITH_PAGE = ("viz", "walk", "assess", "compare")  # commands that have --html
COLUMNS = 100  # of printed text


def register(shell: Any) -> None:
    """Tell an InteractiveShell of IPython how to show our types, and of the command `%paged_ref`."""
    html = shell.display_formatter.formatters["text/html"]
    # By name: nothing is imported before such an object is there.
    html.for_type_by_name("paged_ref.core.engine.outputs", "RequestOutput", output_html)
    html.for_type_by_name("paged_ref.core.memory.paged", "PagedManager", manager_html)
    html.for_type_by_name("paged_ref.llm", "LLM", llm_html)
    shell.register_magic_function(command, "line", "paged_ref")


@dataclass(frozen=True, slots=True)
class HtmlPage:
    """A page of its own below a cell, `height` pixels high."""

    text: str
    height: int = 640

    def _repr_html_(self) -> str:
        # A document of its own: its style and script do not meet those of the notebook.
        frame = f'style="width:100%;height:{self.height}px;border:0"'
        return f'<iframe title="paged_ref" {frame} srcdoc="{escape(self.text)}"></iframe>'


def command(line: str) -> HtmlPage | None:
    """`%paged_ref LINE`: a command in a process of its own. Its page is returned, its text is printed.

    Raises ValueError, with what the command said, if the command fails.
    """
    argv = shlex.split(line)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        wanted = [f"--html={page}"] if argv and argv[0] in WITH_PAGE and "--help" not in argv else []
        done = subprocess.run(
            [sys.executable, "-m", "paged_ref", *argv, *wanted], stdin=subprocess.DEVNULL, capture_output=True,
            text=True, encoding="utf-8", env={**os.environ, "COLUMNS": str(COLUMNS), "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        if done.returncode not in (0, 1):  # 1 is a command's own finding
            raise ValueError(done.stderr.strip())
        if page.exists():
            # The page names the command that made it: without the place that only this call knew.
            return HtmlPage(page.read_text(encoding="utf-8").replace(f"--html={page}", "--html page.html"))
    print(done.stdout + done.stderr, end="")
    return None


def show(events: Iterable[Event], at: int = 1, frame: int = 1) -> HtmlPage:
    """The visualizer, opened at event `at` and frame `frame`, both from 1. Raises ValueError for what is not there."""
    from .timeline.history import histories
    from .views.viz.frames.screen import frames_of
    from .views.viz.viz_page import write_page

    runs = list(histories(list(events)))
    if not runs:
        raise ValueError("events has no run; give a list, and LLM(..., log=events.append) before it generates")
    for name, value, most in (("at", at, len(runs[0])), ("frame", frame, len(frames_of(runs[0])))):
        if not 1 <= value <= most:
            raise ValueError(f"{name} is {value}; 1 to {most} is needed")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        write_page(page, runs, frame - 1, at - 1, None, made_with=f"show(events, at={at}, frame={frame})")
        return HtmlPage(page.read_text(encoding="utf-8"))


# --- our types ------------------------------------------------------------------------------------------------


def output_html(output: RequestOutput) -> str:
    """The prompt in grey before each sample, and how the sample ended."""
    prompt = f'<span style="opacity:0.6">{_text(output.prompt or "")}</span>'
    rows = [
        (sample.index, f"{prompt}{_text(sample.text)}", len(sample.token_ids), sample.finish_reason or "running")
        for sample in output.outputs
    ]
    preempted = f", preempted {output.num_preemptions} times" if output.num_preemptions else ""
    caption = f"request {output.request_id}: {len(output.prompt_token_ids)} tokens of prompt{preempted}"
    return _table(caption, ("sample", "text", "tokens", "ended"), rows)


def manager_html(manager: PagedManager) -> str:
    """The block table of each sequence: logical block → physical block, and how many tables name a shared block."""

    def entry(logical: int, physical: int) -> str:
        count = manager.pool.ref_count[physical]
        return f"{logical}→{physical}" + (f" <b>×{count}</b>" if count > 1 else "")

    rows = [
        (seq_id, table.length, "&ensp; ".join(entry(*each) for each in enumerate(table.blocks)))
        for seq_id, table in manager.tables.items()
    ]
    pool = manager.pool
    caption = (
        f"{pool.num_blocks - pool.num_free} of {pool.num_blocks} blocks in use, {manager.block_size} tokens in a block"
    )
    return _table(caption, ("sequence", "tokens", "logical → physical block"), rows)


def llm_html(llm: LLM) -> str:
    """The model, what waits and runs, and the block tables where there are some."""
    from .core.memory.paged import PagedManager

    config, scheduler, manager = llm.config, llm.engine.scheduler, llm.engine.manager
    caption = (
        f"{config.num_layers} layers, {config.num_heads} heads on {config.num_kv_heads} KV heads of "
        f"{config.head_size}; {manager.num_slots} slots of KV cache; longest request {llm.max_model_len} tokens; "
        f"{len(scheduler.waiting)} waiting, {len(scheduler.running)} running"
    )
    inner = getattr(manager, "manager", manager)  # with a log, the manager is wrapped
    tables = manager_html(inner) if isinstance(inner, PagedManager) else ""
    return f"<p>{escape(caption)}</p>{tables}"


def _text(text: str) -> str:
    return escape(plain(text, lines=True)).replace("\n", "<br>")


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """`caption` and `header` are text; the cells of `rows` are HTML."""
    head = "".join(f'<th style="text-align:left">{escape(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in row) + "</tr>" for row in rows
    )
    title = f'<caption style="text-align:left">{escape(caption)}</caption>'
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
