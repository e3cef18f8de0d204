"""The parts of a printed report: headings, paragraphs, tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..planner.roofline import Bound, Constants, explain
from ..planner.setup import Setup
from ..planner.steady import LIMITS, Steady
from ..views.common.console import Console
from ..views.common.files import write_text
from ..views.common.program import SCRIPT, program

WAITS: dict[Bound, str] = {
    "bandwidth": "reading",
    "compute": "arithmetic",
    "link": "links",
    "overhead": "overhead",
}  # of a step
LEAST_SHARE = 0.05  # of the time: a limit that is named
NARROWEST = 78  # columns: a narrower terminal wraps the lines, so that no number is cut


def wide_console() -> Console:
    """At least NARROWEST wide."""
    return Console(highlight=False, width=max(Console().width, NARROWEST))


def print_heading(console: Console, title: str) -> None:
    console.print()
    console.rule(Text(title, "bold"), align="left", characters="─")


def print_paragraph(console: Console, text: str) -> None:
    """`text` in lines as wide as the console, one space from the left. Commands in it can be pasted."""
    console.print(Padding(text.replace(f"{SCRIPT} ", f"{program()} "), (0, 0, 0, 1)))


def print_rows(console: Console, rows: Iterable[tuple[str, ...]]) -> None:
    """Aligned cells without rules."""
    grid = Table.grid(padding=(0, 2))
    for row in rows:
        grid.add_row(*row)
    console.print(Padding(grid, (0, 0, 0, 1)))


def print_constants(console: Console, constants: Constants) -> None:
    print_rows(console, [(name, f"{value:g}", why) for name, value, why in explain(constants)])


def limit_words(steady: Steady) -> str:
    """What limits the rate, in sentences: what keeps a request out of the batch, what a step waits for, and what twice
    of each would bring."""
    outcome, step = steady.outcome, steady.step
    shares = sorted(outcome.waits_for.items(), key=lambda each: -each[1])
    waits = ", ".join(f"{LIMITS[limit]} ({share:.0%} of the time)" for limit, share in shares if share >= LEAST_SHARE)
    free = outcome.shares.free + outcome.shares.cached
    kept = f"The next request waits for {waits}; {free:.0%} of the memory is free."
    weights, kv, compute, link, overhead = (f"{1000 * seconds:.1f}" for seconds in step)
    between = f"; {link} between the GPUs" if step.link else ""
    times = f"A step takes {1000 * steady.step_seconds:.1f} ms: reading {weights} ms for weights and {kv} for K and V, "
    times += (
        f"arithmetic {compute}, of which the longer counts, {WAITS[step.bound]}{between}; and {overhead} of overhead."
    )
    twice = ", ".join(f"{limit} {factor:.2f}x" for limit, factor in steady.doubled.items())
    return f"{kept} {times} Twice of one of these would raise the roofline to: {twice}."


PRICE = "Price: of 10^6 output tokens at this rate, with the GPUs always in use."


def price_words(price: float | None) -> str:
    return "-" if price is None else f"{price:.3g}"


def model_words(setup: Setup) -> list[str]:
    """What is special about the model and the GPUs, a sentence each."""
    model, gpu, sentences = setup.model, setup.gpu, []
    if model.window is not None:
        sentences.append(
            f"{model.num_windowed_layers} of {model.num_kv_layers} layers see only {model.window:,} tokens. Counted is "
            f"a server that drops the K and V behind the window: {model.kv_share:.0%} of these requests' is kept."
        )
    if model.num_routed:
        sentences.append(
            f"A token meets {model.num_active:,} of the weights. The experts that a step reads follow from its tokens, "
            "with all experts equally likely."
        )
    if gpu.count > 1:
        copies = f", K and V {setup.roofline.kv_copies:g} times" if setup.roofline.kv_copies > 1 else ""
        sentences.append(
            f"{gpu.count} GPUs share each layer{copies}; their sums travel at {gpu.peer / 1e9:,.0f} GB/s between them."
        )
    return sentences


def number_table(*columns: str, wrap_names: bool = False, **settings: Any) -> Table:
    """Names in the first column, and numbers in the others, which are never cut."""
    table = Table(box=box.SIMPLE_HEAD, **{"pad_edge": False, **settings})
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=bool(number) or not wrap_names)
    return table


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line for each row, one column for each number or word in it: `a.b` is b of a. Lists are left out. Raises
    ValueError where the file cannot be written."""
    flat = [dict(_flat(row)) for row in rows]
    columns = dict.fromkeys(name for row in flat for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_text(path, text.getvalue())


def _flat(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif not isinstance(value, (list, tuple)):
            yield f"{before}{name}", value
