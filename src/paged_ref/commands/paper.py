"""`paged-ref paper`: the figures of the PagedAttention paper, measured here, beside the paper's numbers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..planner.findings import Figure, Finding, RunCache
from ..planner.paper import FIGURES
from ..planner.workers import Workers
from ..views.common.console import Console
from ..views.common.plots import Range, ranges_svg
from .planner_options import file_options, report_console, worker_options, workers_of, write_files
from .report_text import Heading, Part, number_table, print_parts, print_title


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = " ".join(FIGURES)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"which: {known} (default: all)")
    worker_options(parser)
    file_options(parser, page=False)


def main(args: argparse.Namespace) -> int:
    for key in args.figures:
        if key not in FIGURES:
            raise ValueError(f"figure is {key!r}; known are {', '.join(FIGURES)}")
    console = report_console(args)
    print_title(
        console, "Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023."
    )
    figures = []
    for figure in _figures(list(dict.fromkeys(args.figures or FIGURES)), workers_of(args)):
        print_parts(console, parts_of(figure))
        figures.append(figure)
    judged = [finding for figure in figures for finding in figure.findings if finding.met is not None]
    outside = [finding.what for finding in judged if not finding.met]
    console.print(f"\n{len(judged) - len(outside)} of {len(judged)} numbers are in their bands.")
    if outside:
        console.print(f"Not: {'; '.join(outside)}.")
    findings = [
        {"figure": figure.key, **asdict(finding), "met": finding.met}
        for figure in figures
        for finding in figure.findings
    ]
    write_files(args, lambda: findings, findings, lambda: picture(figures))
    return 0


def _figures(keys: list[str], workers: Workers) -> Iterator[Figure]:
    """Each figure as soon as it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} runs"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=None)
        runs = RunCache(workers, lambda: progress.advance(task))
        for key in keys:
            yield FIGURES[key](runs)


def heading(figure: Figure) -> str:
    name = f"Fig. {figure.key}" if figure.key[0].isdigit() else "§6.4"
    return f"{name}: {figure.title}"


def picture(figures: list[Figure]) -> str:
    """The numbers that have a band, in units of the paper's number, or of the middle of the band where the paper prints
    none. A number that the paper gives as 0 has no such unit, and is only in the table."""
    groups = []
    for figure in figures:
        ranges = []
        for each in figure.findings:
            ends = [end for end in (each.low, each.high) if end is not None]
            unit = each.paper if isinstance(each.paper, float) else sum(ends) / max(1, len(ends))
            if ends and unit > 0:
                low, high = (None if end is None else end / unit for end in (each.low, each.high))
                ranges.append(Range(each.what, each.ours / unit, low, high))
        if ranges:
            groups.append((heading(figure), ranges))
    return ranges_svg("Ours, and the band around the paper's number", groups, "ours, times the paper's")


def parts_of(figure: Figure) -> Iterator[Part]:
    yield Heading(heading(figure))
    yield figure.setting
    table = number_table("", "ours", "paper", "band", "in it")
    for finding in figure.findings:
        met = {True: "yes", False: "NO", None: ""}[finding.met]
        table.add_row(finding.what, _value(finding.ours, finding), _value(finding.paper, finding), _band(finding), met)
    yield table
    yield from (f"- {sentence}" for sentence in figure.why)


def _value(value: float | str, finding: Finding) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.1f} %" if finding.unit == "%" else f"{value:.2f}{finding.unit}"


def _band(finding: Finding) -> str:
    low, high = (None if bound is None else f"{bound:.3g}" for bound in (finding.low, finding.high))
    if low is None and high is None:
        return ""
    if low is None:
        return f"at most {high}"
    return f"at least {low}" if high is None else f"{low} to {high}"
