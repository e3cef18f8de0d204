"""The rows of the article's table, and each of them simulated and run with the embedded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..timeline.events import Log
from .engine_run import engine_steps, shares_of, simulated_steps
from .hardware import gpu_named
from .metrics import Shares
from .models import model_named
from .setup import Setup
from .steady import admissible, none_served
from .traces import RequestTrace, at_rate, clipped, first, scaled

RUN_REQUESTS = 30  # of a run with the embedded model
RUN_CONTEXT = 256  # tokens, of the model's context
RUN_LENGTH = 48  # tokens of a request, mean
RUN_POOL = 768  # tokens

# The reservations of the standard manager, with the allocator that the paper assumes.
STANDARD: tuple[dict[str, Any], ...] = tuple(
    {"label": f"standard {reserve}", "manager": "standard", "reserve": reserve, "allocator": "buddy"}
    for reserve in ("max", "pow2", "exact")
)


def setups(base: Setup, block_sizes: Sequence[int]) -> list[Setup]:
    """The rows of the table: standard with three reservations, swapping, paged with each block size and with a
    prefix cache. `base` gives everything else. The paper's allocator is "buddy"; exact is there with both."""
    rows = [replace(base, **each) for each in STANDARD]
    rows.append(replace(rows[-1], label="exact, first fit", allocator="first fit"))
    rows.append(replace(base, label="swapping", manager="swapping", preemption="swap"))
    rows += [replace(base, label=f"paged {size}", block_size=size) for size in block_sizes]
    rows.append(replace(base, label=f"paged {base.block_size} + prefix", prefix_cache=True))
    return rows


def able(rows: Sequence[Setup], trace: RequestTrace) -> tuple[list[Setup], list[str]]:
    """The rows that can serve some of the requests, and a sentence for each of the others. Raises ValueError where
    paged memory can serve none."""
    found = [row for row in rows if admissible(row, trace)]
    why = {row.label: none_served(row, trace) for row in rows if row not in found}
    if not any(row.manager == "paged" and not row.prefix_cache for row in found):
        raise ValueError(next(sentence for label, sentence in why.items() if label.startswith("paged")))
    return found, [f"Left out: {sentence}." for sentence in why.values()]


# --- the embedded model, for real ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Checked:
    """A simulation and a run of the same requests."""

    label: str
    simulated: Shares
    ran: Shares
    steps: int
    same: bool  # every step: which sequences ran, for how many tokens, what was preempted and moved, where memory was


def small(trace: RequestTrace) -> RequestTrace:
    """The first requests, arriving at the same time, made short enough for the embedded model."""
    part = first(trace, RUN_REQUESTS)
    mean = sum(each.num_tokens for each in part.requests) / len(part.requests)
    factor = min(1.0, RUN_LENGTH / mean)
    return at_rate(clipped(scaled(part, factor), RUN_CONTEXT), float("inf"))


def check(
    rows: Sequence[Setup], trace: RequestTrace, on_run: Callable[[str], None] | None = None, log: Log | None = None
) -> list[Checked]:
    """Each setup with the embedded model: simulated, and run. `trace` is as `small` makes it. `log` gets the events of
    the engines, one after another."""
    gpu, model, checked = gpu_named("T4"), model_named("tiny"), []
    for row in rows:
        setup = replace(row, gpu=gpu, model=model, kv_tokens=RUN_POOL, max_model_len=RUN_CONTEXT)
        simulated, arrived = simulated_steps(setup, trace)
        ran = engine_steps(setup, trace, arrived, log=log)
        checked.append(Checked(setup.label, shares_of(simulated), shares_of(ran), len(ran), same=simulated == ran))
        if on_run:
            on_run(setup.label)
    return checked
