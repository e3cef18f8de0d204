"""`paged-ref paper`: the figures of the PagedAttention paper, measured here, beside the paper's numbers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..planner.findings import Figure, Finding, RunCache
from ..planner.paper import FIGURES
from ..planner.sweep import checked_jobs, on_cores
from .compare import NARROWEST
from .report_text import print_heading, print_paragraph


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = " ".join(FIGURES)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"which: {known} (default: all)")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")


def main(args: argparse.Namespace) -> int:
    for key in args.figures:
        if key not in FIGURES:
            raise ValueError(f"figure is {key!r}; known are {', '.join(FIGURES)}")
    checked_jobs(args.jobs)
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json} cannot be written: there is no directory {args.json.parent}")
    console = Console(highlight=False, width=max(Console().width, NARROWEST))
    console.print(
        "Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023."
    )
    figures = []
    for figure in _figures(args.figures or list(FIGURES), args.jobs):
        show(console, figure)
        figures.append(figure)
    judged = [finding for figure in figures for finding in figure.findings if finding.met is not None]
    outside = [finding.what for finding in judged if not finding.met]
    console.print(f"\n{len(judged) - len(outside)} of {len(judged)} numbers are in their bands.")
    if outside:
        console.print(f"Not: {'; '.join(outside)}.")
    if args.json:
        findings = [
            {"figure": figure.key, **asdict(finding), "met": finding.met}
            for figure in figures
            for finding in figure.findings
        ]
        args.json.write_text(json.dumps(findings, indent=1) + "\n", encoding="utf-8")
    return 0


def _figures(keys: list[str], num_jobs: int | None) -> Iterator[Figure]:
    """Each figure as soon as it and the figures before it are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} runs"), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        ThreadPoolExecutor(1 if num_jobs == 1 else 32) as threads,
        ThreadPoolExecutor(len(keys)) as waiting,
        on_cores(num_jobs) as call,
    ):
        task = progress.add_task("simulating", total=None)
        runs = RunCache(call, threads, lambda: progress.advance(task))
        for figure in [waiting.submit(FIGURES[key], runs) for key in keys]:
            yield figure.result()


def show(console: Console, figure: Figure) -> None:
    name = f"Fig. {figure.key}" if figure.key[0].isdigit() else "§6.4"
    print_heading(console, f"{name}: {figure.title}")
    print_paragraph(console, figure.setting)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for number, column in enumerate(("", "ours", "paper", "band", "in it")):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
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
