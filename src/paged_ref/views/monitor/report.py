"""The monitor's numbers for programs: one JSON object, or Prometheus text for scrapers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .gpu_meter import GPUReading
from .state import Monitor


def as_json(monitor: Monitor, gpu: GPUReading | None, complete: bool = True) -> dict[str, Any]:
    """The run after the last event. null: the log does not say. `complete`: its last line is whole."""
    memory, totals, last = monitor.state.memory, monitor.totals, monitor.last
    times = [sample.microseconds / 1e6 for sample in monitor.timed()]
    row_bytes = monitor.row_bytes
    return {
        "manager": memory.manager,
        "model": monitor.history.model or None,
        "run": monitor.num_runs,
        "events": monitor.num_events,
        "complete": complete,
        "steps": monitor.num_steps,
        "slots": {
            "total": monitor.num_slots,
            "block_size": memory.block_size,
            **_parts(monitor),
        },
        "sequences": {
            "running": last.running if last else 0,
            "waiting": last.waiting if last else 0,
            "swapped": last.swapped if last else 0,
            "finished": monitor.finished,
        },
        "tokens": {"computed": monitor.computed, "sampled": monitor.sampled},
        "tokens_per_second": monitor.tokens_per_second,
        "step_seconds": {
            "last": times[-1] if times else None,
            "mean": sum(times) / len(times) if times else None,
            "max": max(times, default=None),
            "total": monitor.microseconds / 1e6 if monitor.microseconds else None,
        },
        "swap": {
            "rows_out": totals.rows_out,
            "rows_in": totals.rows_in,
            "bytes_out": totals.rows_out * row_bytes if row_bytes else None,
            "bytes_in": totals.rows_in * row_bytes if row_bytes else None,
        },
        "rows_moved": totals.rows_moved,
        "preemptions": totals.preemptions,
        "forks": totals.forks,
        "copies_on_write": totals.copies,
        "prefix_cache": {
            "hit_tokens": totals.hits,
            "asked_tokens": totals.asked,
            "hit_rate": monitor.hit_rate,
            "evicted_blocks": totals.evicted,
        },
        "gpu": asdict(gpu) if gpu else None,
    }


def _parts(monitor: Monitor) -> dict[str, int]:
    """Where the slots were in the last step; before the first, all are free."""
    last = monitor.last
    if last is None:
        return {"tokens": 0, "empty": 0, "cached": 0, "free": monitor.num_slots}
    return {"tokens": last.tokens, "empty": last.empty, "cached": last.cached, "free": last.free}


# --- Prometheus --------------------------------------------------------------------------------------------

# What is exposed: name, type, help. Names end in their unit, and counters in _total (Prometheus, "Metric and
# label naming").
_FAMILIES = (
    ("slots", "gauge", "Slots of the KV cache by what is in them, in the last step"),
    ("sequences", "gauge", "Sequences by what they do, in the last step"),
    ("sequences_finished_total", "counter", "Sequences that came to their end"),
    ("steps_total", "counter", "Steps of the engine"),
    ("tokens_computed_total", "counter", "Tokens whose K and V were computed, those computed again included"),
    ("tokens_sampled_total", "counter", "New tokens"),
    ("step_seconds_total", "counter", "Time of all steps"),
    ("tokens_per_second", "gauge", "New tokens over the time of the last steps"),
    ("swap_rows_total", "counter", "Rows that travelled between device and host"),
    ("swap_bytes_total", "counter", "Their bytes"),
    ("preemptions_total", "counter", "Sequences that had to make room"),
    ("copies_on_write_total", "counter", "Blocks copied because two sequences shared them"),
    ("prefix_hit_tokens_total", "counter", "Tokens that the prefix cache found"),
    ("prefix_asked_tokens_total", "counter", "Tokens of admitted sequences"),
    ("prefix_evicted_blocks_total", "counter", "Blocks that the prefix cache gave up"),
    ("gpu_busy_ratio", "gauge", "Share of the time in which a kernel ran"),
    ("gpu_memory_busy_ratio", "gauge", "Share of the time in which the memory was read or written"),
    ("gpu_memory_used_bytes", "gauge", "Memory in use on the GPU"),
    ("gpu_link_bytes_per_second", "gauge", "What goes over the host link"),
)


def as_prometheus(monitor: Monitor, gpu: GPUReading | None) -> str:
    """Prometheus text format 0.0.4. What the log or the GPU does not say is left out."""
    samples = _samples(as_json(monitor, gpu))
    run = {"manager": monitor.state.memory.manager, "model": monitor.history.model}
    lines = []
    for name, kind, what in _FAMILIES:
        told = [(labels, value) for found, labels, value in samples if found == name and value is not None]
        if told:
            lines += [f"# HELP paged_ref_{name} {what}.", f"# TYPE paged_ref_{name} {kind}"]
            lines += [f"paged_ref_{name}{_labels(run | labels)} {value}" for labels, value in told]
    return "\n".join(lines) + "\n"


def _samples(found: dict[str, Any]) -> list[tuple[str, dict[str, str], float | None]]:
    """(name, labels, value) of each number."""
    slots, sequences, swap, prefix = found["slots"], found["sequences"], found["swap"], found["prefix_cache"]
    gpu = found["gpu"] or {}

    def ratio(percent: int | None) -> float | None:
        return None if percent is None else percent / 100

    return [
        *(("slots", {"part": part}, slots[part]) for part in ("tokens", "empty", "cached", "free")),
        *(("sequences", {"state": state}, sequences[state]) for state in ("running", "waiting", "swapped")),
        ("sequences_finished_total", {}, sequences["finished"]),
        ("steps_total", {}, found["steps"]),
        ("tokens_computed_total", {}, found["tokens"]["computed"]),
        ("tokens_sampled_total", {}, found["tokens"]["sampled"]),
        ("step_seconds_total", {}, found["step_seconds"]["total"]),
        ("tokens_per_second", {}, found["tokens_per_second"]),
        *(("swap_rows_total", {"direction": way}, swap[f"rows_{way}"]) for way in ("out", "in")),
        *(("swap_bytes_total", {"direction": way}, swap[f"bytes_{way}"]) for way in ("out", "in")),
        ("preemptions_total", {}, found["preemptions"]),
        ("copies_on_write_total", {}, found["copies_on_write"]),
        ("prefix_hit_tokens_total", {}, prefix["hit_tokens"]),
        ("prefix_asked_tokens_total", {}, prefix["asked_tokens"]),
        ("prefix_evicted_blocks_total", {}, prefix["evicted_blocks"]),
        ("gpu_busy_ratio", {}, ratio(gpu.get("busy"))),
        ("gpu_memory_busy_ratio", {}, ratio(gpu.get("memory_busy"))),
        ("gpu_memory_used_bytes", {}, gpu.get("memory_used")),
        *(("gpu_link_bytes_per_second", {"direction": way}, gpu.get(key)) for way, key in
          (("in", "to_gpu"), ("out", "from_gpu"))),
    ]  # fmt: skip


def _labels(labels: dict[str, str]) -> str:
    """`{name="value",...}`; backslash, quote and line break are escaped, as the format wants it."""
    escaped = {
        name: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for name, value in labels.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"
