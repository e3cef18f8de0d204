"""The monitor's numbers for programs: one JSON object, or Prometheus text for scrapers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...extras.plain_text import plain
from .gpu_meter import GPUReading
from .state import WINDOW, Monitor


def as_json(monitor: Monitor, gpu: GPUReading | None, complete: bool = True) -> dict[str, Any]:
    """The run after the last event. null: the log does not say. `complete`: the log's last line is whole."""
    memory, totals, moved = monitor.state.memory, monitor.state.totals, monitor.moved
    times = [sample.microseconds / 1e6 for sample in monitor.timed()]
    slot_bytes = monitor.history.bytes_per_token
    return {
        "manager": memory.manager,
        "model": monitor.history.model or None,
        "run": monitor.num_runs,
        "events": monitor.num_events,
        "complete": complete,
        "steps": monitor.num_steps,
        "slots": {"total": monitor.num_slots, "block_size": memory.block_size, **monitor.slots},
        "sequences": monitor.sequences,
        "tokens": {"computed": monitor.computed, "sampled": monitor.sampled},
        "tokens_per_second": monitor.tokens_per_second,
        "step_seconds": {
            "last": times[-1] if times else None,
            "mean": sum(times) / len(times) if times else None,
            "max": max(times, default=None),
            "total": monitor.microseconds / 1e6 if monitor.microseconds else None,
        },
        "swap": {
            "slots_out": moved["out"],
            "slots_in": moved["in"],
            "bytes_out": moved["out"] * slot_bytes if slot_bytes else None,
            "bytes_in": moved["in"] * slot_bytes if slot_bytes else None,
        },
        "slots_moved": moved["within"],
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


# --- Prometheus --------------------------------------------------------------------------------------------

Value = float | None | Mapping[str, float | None]  # of a family, or of each value of its label
Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]


def as_prometheus(monitor: Monitor, gpu: GPUReading | None) -> str:
    """Prometheus text format 0.0.4. What the log or the GPU does not say is left out."""
    registry = CollectorRegistry()
    registry.register(_Families(as_json(monitor, gpu)))
    return generate_latest(registry).decode()


class _Families(Collector):
    def __init__(self, numbers: dict[str, Any]) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        return (family for family in _families(self._numbers) if family.samples)


def _families(numbers: dict[str, Any]) -> list[Metric]:
    """One family for each kind of number. Names end in their unit (Prometheus, "Metric and label naming")."""
    slots, sequences, tokens, swap = (numbers[key] for key in ("slots", "sequences", "tokens", "swap"))
    prefix, gpu = numbers["prefix_cache"], numbers["gpu"] or {}
    parts = {part: slots[part] for part in ("tokens", "empty", "cached", "free")}
    states = {state: sequences[state] for state in ("running", "waiting", "swapped")}
    copied, sizes = ({way: swap[f"{unit}_{way}"] for way in ("out", "in")} for unit in ("slots", "bytes"))
    link = {"in": gpu.get("to_gpu"), "out": gpu.get("from_gpu")}
    run = {name: plain(numbers[name] or "") for name in ("manager", "model")}

    gauge, counter = GaugeMetricFamily, CounterMetricFamily  # the samples of a counter end in _total
    families: list[tuple[Kind, str, str, Value, str]] = [
        (gauge, "slots", "KV cache slots by content; empty: allocated, no token yet", parts, "part"),
        (gauge, "sequences", "Sequences by state", states, "state"),
        (counter, "sequences_finished", "Sequences that finished", sequences["finished"], ""),
        (counter, "steps", "Engine steps", numbers["steps"], ""),
        (counter, "tokens_computed", "Tokens whose K and V were computed or recomputed", tokens["computed"], ""),
        (counter, "tokens_sampled", "Generated tokens", tokens["sampled"], ""),
        (counter, "step_seconds", "Time spent in steps", numbers["step_seconds"]["total"], ""),
        (gauge, "tokens_per_second", f"Generated tokens per second of the last {WINDOW} steps",
         numbers["tokens_per_second"], ""),
        (counter, "swap_slots", "Slots copied between device and host", copied, "direction"),
        (counter, "swap_bytes", "Bytes copied between device and host", sizes, "direction"),
        (counter, "preemptions", "Sequences preempted", numbers["preemptions"], ""),
        (counter, "copies_on_write", "Blocks copied on write", numbers["copies_on_write"], ""),
        (counter, "prefix_hit_tokens", "Tokens found in the prefix cache", prefix["hit_tokens"], ""),
        (counter, "prefix_asked_tokens", "Tokens looked up in the prefix cache", prefix["asked_tokens"], ""),
        (counter, "prefix_evicted_blocks", "Blocks evicted from the prefix cache", prefix["evicted_blocks"], ""),
        (gauge, "gpu_busy_ratio", "Share of the time in which a kernel ran", _ratio(gpu.get("busy")), ""),
        (gauge, "gpu_memory_busy_ratio", "Share of the time in which GPU memory was read or written",
         _ratio(gpu.get("memory_busy")), ""),
        (gauge, "gpu_memory_used_bytes", "GPU memory in use", gpu.get("memory_used"), ""),
        (gauge, "gpu_link_bytes_per_second", "Traffic over the host link", link, "direction"),
    ]  # fmt: skip
    return [_family(*family, run) for family in families]


def _family(kind: Kind, name: str, meaning: str, value: Value, label: str, run: Mapping[str, str]) -> Metric:
    """One sample, or one for each value of `label`. A value of None is no sample."""
    metric = kind(f"paged_ref_{name}", f"{meaning}.", labels=[*run, label] if label else list(run))
    for key, number in (value if isinstance(value, Mapping) else {"": value}).items():
        if number is not None:
            metric.add_metric([*run.values(), key] if label else list(run.values()), number)
    return metric


def _ratio(percent: int | None) -> float | None:
    return None if percent is None else percent / 100
