"""What a benchmark ran on, and whether the machine was quiet: the line that `paged-ref bench` prints at the end."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

from llvmlite import binding as llvm

from ..tuned.threads import cores, num_threads

BUSY_LOAD, BUSY_SPREAD = 0.5, 0.1  # above these the machine is called busy
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sve": "SVE", "neon": "NEON"}  # the widest first

_spreads: list[float] = []  # of the contenders so far


def describe_cpu() -> dict[str, str | int]:
    """The processor's name, its widest vectors, the cores that this process may use, and the threads that it uses."""
    features = llvm.get_host_cpu_features()
    vectors = next((name for feature, name in VECTORS.items() if features.get(feature)), "no known vectors")
    return {"cpu": _name(), "vectors": vectors, "cores": cores(), "threads": num_threads()}


def _name() -> str:
    """The name that the processor gives itself, as far as the system says it."""
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()


def record_rounds(seconds: Sequence[float]) -> None:
    """Remember how far the rounds of one contender spread."""
    if len(seconds) >= 4:
        low, _, high = quantiles(seconds, n=4)
        _spreads.append((high - low) / median(seconds))


def spread() -> float | None:
    """How far the middle half of the rounds spreads, as a share of the median: the median over all contenders."""
    return median(_spreads) if _spreads else None


def load() -> float | None:
    """Processes that wanted to run, mean over the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def closing_line(load_before: float | None) -> str:
    """On what the benchmark ran, and a note if the machine was busy."""
    cpu, spread_now = describe_cpu(), spread()
    said = [f"{cpu['cpu']}, {cpu['vectors']}, {cpu['cores']} cores, {cpu['threads']} threads"]
    if spread_now is not None:
        said.append(f"the middle half of the rounds spreads by {spread_now:.0%}")
    if load_before is not None:
        said.append(f"load before: {load_before:.1f}")
    busy = (load_before or 0) > BUSY_LOAD or (spread_now or 0) > BUSY_SPREAD
    return "; ".join(said) + (". THE MACHINE WAS BUSY: measure again when it is quiet." if busy else ".")
