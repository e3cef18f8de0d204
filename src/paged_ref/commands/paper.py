"""`paged-ref paper`: the figures of the PagedAttention paper, measured here, beside the paper's numbers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..planner.findings import Figure, Finding, RunCache
from ..planner.paper import FIGURES
from ..planner.workers import Workers
from ..views.common import options
from ..views.common.console import Console
from ..views.common.files import write_json
from .planner_options import worker_options, workers_of
from .report_text import number_table, print_heading, print_paragraph, wide_console, write_csv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = " ".join(FIGURES)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"which: {known} (default: all)")
    worker_options(parser)
    options.json_output(parser, "write all numbers here")
    options.output(parser, "--csv", "write all numbers here")


def main(args: argparse.Namespace) -> int:
    for key in args.figures:
        if key not in FIGURES:
            raise ValueError(f"figure is {key!r}; known are {', '.join(FIGURES)}")
    console = wide_console()
    console.print(
        "Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023."
    )
    figures = []
    for figure in _figures(args.figures or list(FIGURES), workers_of(args)):
        show(console, figure)
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
    if args.json:
        write_json(args.json, findings)
    if args.csv:
        write_csv(args.csv, findings)
    return 0


def _figures(keys: list[str], workers: Workers) -> Iterator[Figure]:
    """Each figure as soon as it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} runs"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=None)
        runs = RunCache(workers, lambda: progress.advance(task))
        for key in keys:
            yield FIGURES[key](runs)


def show(console: Console, figure: Figure) -> None:
    name = f"Fig. {figure.key}" if figure.key[0].isdigit() else "§6.4"
    print_heading(console, f"{name}: {figure.title}")
    print_paragraph(console, figure.setting)
    table = number_table("", "ours", "paper", "band", "in it")
    for finding in figure.findings:
        met = {True: "yes", False: "NO", None: ""}[finding.met]
        table.add_row(finding.what, _value(finding.ours, finding), _value(finding.paper, finding), _band(finding), met)
    console.print(table)
    for sentence in figure.why:
        print_paragraph(console, f"- {sentence}")


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
