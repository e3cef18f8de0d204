"""The monitor's screen: the pool now, memory over the last steps, the sequences, the speed, swaps and the GPU."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from ...core.checks import plural
from ..common.bars import bar, chart, legend, numbers
from ..common.canvas import DIM, Lines, filled, fit, line, page, rule, size_of, title_line, too_small, wrap
from ..common.sparkline import sparkline
from ..viz.frames.blocks import overview, pool_title
from ..viz.frames.screen import SMALLEST
from ..viz.frames.tables import slot_map
from ..viz.scene import owners
from .gpu_meter import GPUReading
from .state import WINDOW, Monitor, StepSample

_TEXT_ROWS = 5  # of numbers, below the chart
_FIXED = 7 + _TEXT_ROWS  # rows that are neither map nor chart


def screen(
    monitor: Monitor, width: int, height: int, *, gpu: GPUReading | str = "", status: str = "", keys: str = ""
) -> Text:
    """The run in exactly `width` x `height` cells. `gpu` is a reading, or why there is none; `keys` goes below."""
    if (small := too_small(width, height, SMALLEST)) is not None:
        return small
    if monitor.opened is None:
        rows = [_title(monitor, width, status), line(""), *(line(f" {row}") for row in wrap(status, width - 2))]
    else:
        room = height - _FIXED
        blocks = _map(monitor, width - 2, min(6, room // 2))
        rows = [
            _title(monitor, width, status),
            _pool_rule(monitor, width),
            *(Text.assemble(" ", row) for row in blocks),
            rule("Memory", width, "  ".join(legend(monitor.slots))),
            *_memory(monitor, width),
            *_chart(list(monitor.samples), width, room - len(blocks)),
            rule("Run", width, f"times of the last {WINDOW} steps"),
            *_numbers(monitor, width, gpu),
        ]
    return page([*filled(rows, height - 1), line((f" {keys}", DIM))], width, height)


def _title(monitor: Monitor, width: int, status: str) -> Text:
    parts = [f"{monitor.state.memory.manager} manager"] if monitor.opened else ["monitor"]
    if monitor.history.model:
        parts.append(monitor.history.model)
    if monitor.num_runs > 1:
        parts.append(f"run {monitor.num_runs}")
    if status and monitor.opened:
        parts.append(status)
    step = f"step {monitor.last.step:,}" if monitor.last else "no step yet"
    right = f"  {step}, {plural(monitor.num_events, 'event')} "
    return title_line(parts, right, width)


# --- memory ------------------------------------------------------------------------------------------------


def _pool_rule(monitor: Monitor, width: int) -> Text:
    memory = monitor.state.memory
    if not monitor.state.memory.paged:
        return rule(f"Pool: {memory.num_blocks:,} slots", width, "a letter holds a token, ░ is allocated and empty")
    used = memory.num_blocks - len(memory.free) - len(memory.cached)
    cached = f"{len(memory.cached):,} cached, " if memory.cached else ""
    note = f"{used:,} used, {cached}{len(memory.free):,} free"
    return rule(pool_title(monitor.moment()), width, note)


def _map(monitor: Monitor, width: int, height: int) -> Lines:
    moment = monitor.moment()
    height = max(1, min(height, -(-monitor.state.memory.num_blocks // width)))
    if monitor.state.memory.paged:
        return overview(moment, owners(moment), width, height)
    return slot_map(moment, width, height)


def _memory(monitor: Monitor, width: int) -> Lines:
    """The pool now as one bar, and in numbers."""
    slots, total = monitor.slots, monitor.num_slots
    return [bar(slots, total, width - 2), numbers(slots, total, zeros=True)]


def _chart(samples: Sequence[StepSample], width: int, height: int) -> Lines:
    """A column for each of the last steps, the pool from the bottom up; below it, which steps they are."""
    if height < 2 or not samples:
        return [line("")] * max(0, height)
    shown = samples[-(width - 2) :]
    columns = chart([sample.slots for sample in shown], width - 2, height - 1)
    steps = line((f" steps {shown[0].step:,} to {shown[-1].step:,}", DIM))
    return [*columns, steps]


# --- numbers -----------------------------------------------------------------------------------------------


def _numbers(monitor: Monitor, width: int, gpu: GPUReading | str) -> Lines:
    rows = [_sequences(monitor), _speed(monitor, width), _traffic(monitor), _prefix(monitor), _gpu(gpu)]
    assert len(rows) == _TEXT_ROWS
    return [line(" ", (f"{name:<10}", "bold"), fit(text, width - 12)) for name, text in rows]


def _sequences(monitor: Monitor) -> tuple[str, str]:
    text = ", ".join(f"{number:,} {status}" for status, number in monitor.sequences.items())
    if monitor.last and not monitor.all_finished:
        text += f"; a batch of {plural(monitor.last.computed, 'token')}"
    return "sequences", text


def _speed(monitor: Monitor, width: int) -> tuple[str, str]:
    timed = monitor.timed()
    if not timed:
        return "speed", f"{monitor.sampled:,} new tokens; this log has no times"
    times = [sample.microseconds / 1000 for sample in timed]
    text = (
        f"{monitor.tokens_per_second:,.0f} tokens/s, a step takes {sum(times) / len(times):.1f} ms "
        f"(longest {max(times):.1f}) "
    )
    return "speed", text + sparkline(times, width - 12 - len(text))


def _traffic(monitor: Monitor) -> tuple[str, str]:
    totals, moved = monitor.state.totals, monitor.moved
    num_bytes = (moved["out"] + moved["in"]) * monitor.history.bytes_per_token
    size = f" ({size_of(num_bytes)})" if num_bytes else ""
    parts = [f"{plural(moved['out'], 'slot')} out, {moved['in']:,} in{size}", f"{totals.preemptions:,} preempted"]
    if moved["within"]:
        parts.append(f"{moved['within']:,} moved on the device")
    if totals.copies:
        parts.append(f"{totals.copies:,} copied on write")
    return "swap", ", ".join(parts)


def _prefix(monitor: Monitor) -> tuple[str, str]:
    totals, rate = monitor.state.totals, monitor.hit_rate
    known = monitor.state.memory.known
    if rate is None or not (totals.hits or totals.evicted or known):
        return "prefix", "nothing found: no prefix cache, or no two prompts that begin alike"
    return "prefix", (
        f"{rate:.0%} of {plural(totals.asked, 'token')} found, {plural(totals.evicted, 'block')} evicted, "
        f"{len(known):,} in the cache"
    )


def _gpu(gpu: GPUReading | str) -> tuple[str, str]:
    if isinstance(gpu, str):
        return "GPU", gpu or "not read"
    parts = []  # the name comes last: a narrow window cuts off what it needs least
    if gpu.busy is not None and gpu.memory_busy is not None:
        parts.append(f"{gpu.busy} % busy, its memory {gpu.memory_busy} %")
    if gpu.memory_used is not None and gpu.memory_total:
        parts.append(f"{gpu.memory_used / 2**30:.1f} of {gpu.memory_total / 2**30:.1f} GiB")
    if gpu.to_gpu is not None and gpu.from_gpu is not None:
        parts.append(f"link {gpu.to_gpu / 1e9:.1f} in, {gpu.from_gpu / 1e9:.1f} GB/s out")
    return "GPU", ", ".join([*parts, gpu.name])
