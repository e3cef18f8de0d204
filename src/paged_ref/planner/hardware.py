"""Known GPUs, as their makers publish them: memory, bandwidth, arithmetic, and the link to the host.

data/gpus.toml has the numbers and their sources.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..core import device
from .tables import read_table

GIB = 2**30


@dataclass(frozen=True, slots=True)
class GPU:
    """One GPU, or several that work as one. The rates are peaks; roofline.Constants has the shares that are reached."""

    name: str
    memory_bytes: int
    bandwidth: float  # bytes/s of its memory
    flops: float  # operations/s, dense, 16-bit floats
    link: float  # bytes/s to the host, one direction
    peer: float  # bytes/s of one GPU to the others, one direction
    driver_names: tuple[str, ...] = ()  # that the driver uses, without "NVIDIA", "Tesla" and "GeForce"
    count: int = 1
    price_per_hour: float | None = None  # in any currency
    source: str = ""  # of the numbers, with its date


_TABLE = read_table("gpus")
GPUS = {
    name: GPU(
        name,
        memory_bytes=row["gib"] * GIB,
        bandwidth=row["gb_per_s"] * 1e9,
        flops=row["tflops"] * 1e12,
        link=row["link"] * 1e9,
        peer=row.get("peer", row["link"]) * 1e9,
        driver_names=tuple(row["driver"]),
        source=f"{row['source']}, {row.get('looked_up', _TABLE['looked_up'])}",
    )
    for name, row in _TABLE["gpus"].items()
}
DEFAULT_GPU = "A100-80GB"


def gpu_named(name: str) -> GPU:
    """A known GPU, or with "auto" the one in this machine, with the memory that the driver reports. Case, spaces and
    hyphens do not matter. Raises ValueError that lists the known names, or says why no GPU was found.
    """
    if name.strip().casefold() == "auto":
        if not device.on_gpu:
            raise ValueError(f"gpu is 'auto'; {device.reason}. Name one: known are {', '.join(GPUS)}")
        properties = device.xp.cuda.runtime.getDeviceProperties(0)
        gpu = gpu_of_driver(properties["name"].decode())
        return replace(gpu, memory_bytes=int(properties["totalGlobalMem"]))
    for gpu in GPUS.values():
        if _plain(gpu.name) == _plain(name):
            return gpu
    raise ValueError(f"gpu is {name!r}; known are auto, {', '.join(GPUS)}")


def gpu_of_driver(driver_name: str) -> GPU:
    """The GPU of that name. The match is exact: an RTX 4090 D or a laptop's 4090 is another chip."""
    short = re.sub(r"^(NVIDIA|Tesla|GeForce|\s)+", "", driver_name)
    for gpu in GPUS.values():
        if _plain(short) in map(_plain, gpu.driver_names):
            return gpu
    raise ValueError(
        f"gpu is 'auto'; this machine has a {driver_name}, whose datasheet is not in the table. "
        f"Name the nearest: {', '.join(GPUS)}"
    )


def several(gpu: GPU, count: int) -> GPU:
    """`count` GPUs as one, each with its share of every layer (tensor parallel). Raises ValueError."""
    if count < 1:
        raise ValueError(f"num_gpus is {count}; at least 1 is needed")
    if count == 1:
        return gpu
    sums = {name: count * getattr(gpu, name) for name in ("memory_bytes", "bandwidth", "flops", "link")}
    price = None if gpu.price_per_hour is None else count * gpu.price_per_hour
    return replace(gpu, name=f"{count} x {gpu.name}", count=count, price_per_hour=price, **sums)


def price_of_million(gpu: GPU, tokens_per_second: float) -> float | None:
    """The price of 10**6 tokens at this rate; None without a price, or where no token comes."""
    if gpu.price_per_hour is None or not tokens_per_second:
        return None
    return gpu.price_per_hour / 3600 / tokens_per_second * 1e6


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()
