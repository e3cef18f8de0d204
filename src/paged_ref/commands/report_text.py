"""A report as its parts, how they are printed, and the words and tables that several reports have."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..core.checks import plural
from ..planner.metrics import Limits
from ..planner.roofline import Bound, Constants, explain
from ..planner.setup import Setup
from ..planner.steady import LIMITS, Steady
from ..planner.sweep import MOST_LOAD
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


# --- parts ---------------------------------------------------------------------------------------------


class Heading(NamedTuple):
    words: str


class Code(NamedTuple):
    """One line that can be copied."""

    text: str


class OnScreen(NamedTuple):
    """What only a screen shows; `make` takes the columns."""

    make: Callable[[int], RenderableType]


class OnPage(NamedTuple):
    """A picture that only a page shows, as SVG."""

    make: Callable[[], str]


Part = str | Table | Heading | Code | OnScreen | OnPage  # a str is a paragraph


def print_title(console: Console, title: str) -> None:
    console.print(Text(title, "bold"))


def print_parts(console: Console, parts: Iterable[Part]) -> None:
    """A paragraph is in lines as wide as the console, one space from the left; commands in it can be pasted."""
    for part in parts:
        match part:
            case str():
                console.print(Padding(part.replace(f"{SCRIPT} ", f"{program()} "), (0, 0, 0, 1)))
            case Heading(words):
                console.print()
                console.rule(Text(words, "bold"), align="left", characters="─")
            case Code(text):
                console.print(f"   {text}", soft_wrap=True)
            case OnScreen(make):
                console.print(make(console.width), no_wrap=True)
            case Table(show_header=False):
                console.print(Padding(part, (0, 0, 0, 1)))
            case Table():
                console.print(part)


def rows_table(rows: Iterable[tuple[str, ...]]) -> Table:
    """Aligned cells without rules."""
    grid = Table.grid(padding=(0, 2))
    for row in rows:
        grid.add_row(*row)
    return grid


def constants_table(constants: Constants) -> OnScreen:
    """A page has them among its sources."""
    rows = rows_table((name, f"{value:g}", why) for name, value, why in explain(constants))
    return OnScreen(lambda columns: Padding(rows, (0, 0, 0, 1)))


# --- words ---------------------------------------------------------------------------------------------


def left_out_words(steady: Steady) -> list[str]:
    """Requests that are refused, and outputs that are cut."""
    sentences = []
    if steady.num_refused:
        refused = f"Refused, since they could never fit: {plural(steady.num_refused, 'request')}"
        sentences.append(f"{refused}; the first: {steady.refusal}.")
    if steady.num_cut:
        sentences.append(f"Cut at the context of {steady.setup.longest:,}: {plural(steady.num_cut, 'output')}.")
    return sentences


def goodput_words(limits: Limits) -> list[str]:
    if not limits:
        return []
    return [
        f"Goodput: the highest rate at which the limits are met: {limits.describe()}. It is sought up to "
        f"{MOST_LOAD:.0%} of the sustained rate: nearer to that, a queue grows for longer than a run lasts."
    ]


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


def price_sentence(setup: Setup) -> list[str]:
    if setup.gpu.price_per_hour is None:
        return []
    return ["Price: of 10^6 output tokens at this rate, with the GPUs always in use."]


def rate_words(value: float, of: float | None = None) -> str:
    """Two decimals, of large numbers none, of small ones two or three digits: as many as `of` has, by default as many
    as the number itself."""
    size = value if of is None else of
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if size >= 0.1 or not size else f"{value:.{3 if of is None else 2}g}"


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
