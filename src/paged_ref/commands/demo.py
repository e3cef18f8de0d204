"""`paged-ref demo`, the main job: the same prompts and the same KV budget, with standard and with paged memory.

All numbers and texts shown come from the two runs.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from statistics import mean
from time import perf_counter
from typing import TYPE_CHECKING, Literal, get_args

from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..core.engine.outputs import RequestOutput
from ..core.engine.sequence import Status
from ..core.model.config import kv_bytes_per_token
from ..extras.sampling_params import SamplingParams
from ..extras.step_records import StepRecord, StepRecords
from ..extras.token_text import token_text
from ..interop.checkpoints import load
from ..llm import LLM
from ..views.common import options
from ..views.common.console import Console
from ..views.common.files import recording
from ..views.common.program import program
from ..views.common.versions import describe_device

if TYPE_CHECKING:
    from ..timeline.events import Log

Manager = Literal["standard", "paged"]
MANAGERS: tuple[Manager, ...] = get_args(Manager)
MAX_MODEL_LEN = 512  # what the standard manager reserves for each request, unless the model has less

# Prompts of very different lengths, and how many tokens each may generate.
_LILY = (
    "Once upon a time, there was a little girl named Lily. She lived in a small house near the sea with her "
    "mom, her dad and a big brown dog. Every day they went to the beach to look for shells. "
)
_BEN = (
    "One day, Ben found a red box under the tree in the garden. He wanted to open it, but it was shut. "
    "He asked his sister to help him, and she brought a stick. They pushed and pulled, and pulled again. "
)
REQUESTS: list[tuple[str, int]] = [
    ("Four score and seven years ago our", 40),
    ("Once upon a time", 120),
    (_LILY * 3 + "One morning, the dog was", 30),
    ("The cat", 24),
    (_BEN + "At last", 60),
    ("Tom had a big", 90),
    (_LILY + "On Sunday", 48),
    (_BEN * 3 + _LILY + "Then", 20),
    ("It was a cold day and", 100),
    ("Mom said,", 16),
    (_LILY + _BEN + "When the sun went down,", 64),
    ("There was a boy who", 32),
    ("The little bird", 80),
    (_BEN + "Inside the box", 36),
    ("Sara and Tim were", 56),
    (_LILY * 2 + "The shell", 28),
]


@dataclass(slots=True)
class DemoRun:
    """One pass over the requests, as measured."""

    name: str
    outputs: list[RequestOutput]
    seconds: float
    records: list[StepRecord]
    block_table: list[int]  # of the first request, at its longest; empty without blocks
    block_tokens: list[int]  # the tokens in these blocks

    def share(self, part: str) -> float:
        """One part of MemoryUsage as a share of the pool: mean over the steps in which a request waited for memory,
        or over all steps if no request ever waited."""
        lengths = [len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1 for output in self.outputs]
        # The requests were added in order, with one sequence each: their sequence ids follow each other.
        final = dict(enumerate(lengths, start=min(seq_id for seq_id, _ in self.records[0].chunks)))
        short = [record for record in self.records if record.num_waiting] or self.records
        usages = [record.snapshot.usage(final) for record in short]
        return float(mean(getattr(usage, part) / usage.total for usage in usages))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.model(parser)
    options.block_size(parser)
    options.kv_tokens(parser, 1024, "KV budget (default 1024 tokens)")
    options.backend(parser)
    options.record_output(parser, "write both runs as JSON lines, for viz and monitor")


def main(args: argparse.Namespace) -> int:
    console = Console()
    engines = [_engine(args, manager) for manager in MANAGERS]
    per_token = kv_bytes_per_token(engines[0].config, "float32")
    console.print(
        f"{len(REQUESTS)} requests on {describe_device()}. The KV budget is {args.kv_tokens} tokens of {per_token} "
        f"bytes: {args.kv_tokens * per_token / 2**20:.1f} MiB.\n"
    )
    with console.status("compiling the kernels, once on each machine ..."):
        for llm in engines:
            llm.generate([prompt for prompt, _ in REQUESTS], SamplingParams(max_tokens=2))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with recording(args.record) as log, Progress(*columns, console=console) as progress:
        runs = []
        for manager, llm in zip(MANAGERS, engines, strict=True):
            # A log begins with a new engine: the run above is not part of it, nor the other manager's.
            runs.append(_run(manager, _engine(args, manager, log) if log else llm, progress))
    return _report(console, engines[1], *runs)


def _engine(args: argparse.Namespace, manager: Manager, log: Log | None = None) -> LLM:
    context = load(args.model).config.max_position_embeddings
    return LLM(
        args.model, manager=manager, block_size=args.block_size, kv_cache_tokens=args.kv_tokens, backend=args.backend,
        max_model_len=min(MAX_MODEL_LEN, context, max(args.kv_tokens, 1)), log=log,
    )  # fmt: skip


def _run(name: str, llm: LLM, progress: Progress) -> DemoRun:
    """All requests in one batch, step by step. The first request's block table is copied before each step."""
    kernel = "paged" if llm.engine.manager.paged else "naive"
    task = progress.add_task(f"{name} manager, {kernel} attention", total=len(REQUESTS))
    records: list[StepRecord] = []
    llm.engine.observers.append(StepRecords(llm.engine.scheduler, records.append))
    began = perf_counter()
    request_ids = [llm.add_request(prompt, SamplingParams(max_tokens=length)) for prompt, length in REQUESTS]
    requests = [llm.output_of(request_id) for request_id in request_ids]
    group = llm.engine.scheduler.waiting[0]
    first = group.leader
    block_table: list[int] = []
    block_tokens: list[int] = []
    while llm.has_unfinished:
        if group.status is Status.RUNNING and llm.engine.manager.paged:
            block_table = llm.engine.manager.placement(first.seq_id).copy()
            block_tokens = first.tokens[: first.num_computed]
        llm.step()
        progress.update(task, completed=sum(request.finished is not None for request in requests))
    return DemoRun(name, requests, perf_counter() - began, records, block_table, block_tokens)


# --- what is printed ---------------------------------------------------------------------------------------------


def _report(console: Console, llm: LLM, standard: DemoRun, paged: DemoRun) -> int:
    """Print the two runs side by side. The exit status: 1 if their tokens differ. `llm` made the paged run."""
    wanted, found = ([output.outputs[0].token_ids for output in run.outputs] for run in (standard, paged))
    verdict = "identical" if found == wanted else "DIFFERENT"
    console.print(_texts(paged))
    console.print(f"Token ids of the two runs: {verdict} ({sum(map(len, found))} new tokens).\n")
    console.print(_block_table(paged, llm))
    console.print(_comparison([standard, paged]))
    console.print(f"Next: {program()} generate --prompt Once", highlight=False)
    console.print("lets the model write. src/paged_ref/core/memory/paged.py is what made the difference.")
    return 0 if found == wanted else 1


def _texts(run: DemoRun) -> Table:
    table = Table(title="What the model wrote (shortened)", box=box.SIMPLE, show_header=False)
    table.add_column(style="dim", max_width=26)
    table.add_column()
    for output in run.outputs:
        prompt, text = output.prompt or "", " ".join(output.outputs[0].text.split())
        begin = prompt if len(prompt) <= 36 else "... " + prompt[-32:]
        table.add_row(Text(begin), Text(text if len(text) <= 120 else text[:116] + " ..."))
    return table


def _block_table(run: DemoRun, llm: LLM) -> Table:
    """The first request's tokens in their slots, block by block."""
    size = llm.engine.manager.block_size
    title = f"The first request: its block table, and the tokens in its slots (block size {size})"
    table = Table(title=title, box=box.SIMPLE)
    for column in ("logical\nblock", "physical\nblock", "slots"):
        table.add_column(column, justify="right", no_wrap=column == "slots")
    table.add_column("tokens")
    for logical, physical in enumerate(run.block_table):
        held = run.block_tokens[logical * size : (logical + 1) * size]
        pieces = [token_text(llm.tokenizer, token_id) for token_id in held] + ["_"] * (size - len(held))
        slots = f"{physical * size}-{physical * size + size - 1}"
        table.add_row(str(logical), str(physical), slots, Text(" | ".join(pieces)))
    return table


def _comparison(runs: list[DemoRun]) -> Table:
    caption = (
        "Memory: shares of the KV budget, mean over the steps in which a request had to wait. Internal: "
        "never used by the request that holds it. External: in holes too small for the next one. "
        "Time to first token: mean."
    )
    table = Table(title="The same requests, the same KV budget", caption=caption, box=box.SIMPLE_HEAD)
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right")
    figures = [_figures(run) for run in runs]
    for label in figures[0]:
        table.add_row(label, *(each[label] for each in figures))
    return table


def _figures(run: DemoRun) -> dict[str, str]:
    running = [record.num_running for record in run.records]
    num_tokens = sum(len(output.outputs[0].token_ids) for output in run.outputs)
    first_token = mean((output.first_token or output.arrival) - output.arrival for output in run.outputs)
    return {
        "running sequences, mean": f"{mean(running):.1f}",
        "running sequences, peak": f"{max(running)}",
        "memory holding tokens": f"{run.share('tokens'):.1%}",
        "  reserved for later": f"{run.share('reserved'):.1%}",
        "  internal": f"{run.share('internal'):.1%}",
        "  external": f"{run.share('external'):.1%}",
        "  free": f"{run.share('free'):.1%}",
        "steps": f"{len(run.records)}",
        "preemptions": f"{sum(output.num_preemptions for output in run.outputs)}",
        "tokens per second": f"{num_tokens / run.seconds:.0f}",
        "time to first token": f"{1000 * first_token:.0f} ms",
    }
