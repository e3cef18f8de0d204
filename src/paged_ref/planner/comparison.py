"""The article's table with numbers: each technique on the same requests, predicted, simulated, and run.

`setups` makes the rows of the table; a `ComparisonRow` has the numbers of one of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.memory.manager import KVCacheManager
from ..timeline.events import Log
from .engine_run import engine_steps, shares_of, simulated_steps
from .hardware import gpu_named
from .metrics import Shares
from .models import model_named
from .setup import Setup
from .sweep import Curve
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


def longest_request(manager: KVCacheManager, context: int) -> int:
    """Tokens of the longest request that an empty pool holds, up to the model's context."""
    lengths = range(1, context + 1)
    return bisect_right(lengths, manager.num_slots, key=lambda length: manager.max_slots_needed(1, length - 1))


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """The numbers of one technique."""

    curve: Curve
    longest: int  # tokens of the longest request

    @property
    def moved_per_token(self) -> float:
        """Bytes of K and V moved on the device or over the link, for each generated token, when there is always more to
        do."""
        outcome = self.curve.steady.outcome
        return (outcome.bytes_moved + outcome.bytes_swapped) / outcome.output_tokens

    def to_json(self) -> dict[str, Any]:
        curve = self.curve
        goodput = curve.goodput.to_json() if curve.goodput else {"goodput": None}
        return {
            "label": curve.setup.label,
            **curve.steady.to_json(),
            **goodput,
            "price_of_million_tokens": curve.price,
            "longest_request": self.longest,
            "moved_bytes_per_token": self.moved_per_token,
            "points": [{"rate": point.rate, **point.outcome.to_json()} for point in curve.points],
        }


def row_of(curve: Curve) -> ComparisonRow:
    return ComparisonRow(curve, longest_request(curve.setup.make_manager(), curve.setup.model.max_context))


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
