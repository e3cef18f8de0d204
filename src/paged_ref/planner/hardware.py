"""Known GPUs, as their makers publish them: memory, bandwidth, arithmetic, and the link to the host.

Arithmetic is dense fp16 or bf16 on the tensor cores with float32 sums. Datasheets since Hopper print twice that,
"with sparsity", and GeForce boxes print sums in fp16: both are halved here. The link is one direction of 16 PCIe
lanes; datasheets print both directions together. A vendor's GB of memory is 2**30 bytes of chips; the driver
and error correction keep a few percent of it, and bandwidths are in 10**9.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..core import device

GIB = 2**30
PCIE3, PCIE4, PCIE5 = 16e9, 32e9, 64e9  # bytes/s of 16 lanes, one direction


@dataclass(frozen=True, slots=True)
class GPU:
    """One GPU, or several that work as one. The rates are peaks: roofline.py says what share is reached."""

    name: str
    memory_bytes: int
    bandwidth: float  # bytes/s of its memory
    flops: float  # operations/s, dense, 16-bit floats
    link: float  # bytes/s to the host, one direction
    driver_names: tuple[str, ...] = ()  # what the driver calls it, less "NVIDIA", "Tesla" and "GeForce"
    count: int = 1


def _gpu(name: str, gib: int, gb_per_s: float, tflops: float, link: float, *driver_names: str) -> GPU:
    return GPU(name, gib * GIB, gb_per_s * 1e9, tflops * 1e12, link, driver_names)


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 datasheet (2021): 40 GB 1555 GB/s; 80 GB 2039 (SXM) and 1935 (PCIe); 312 TFLOPS.
        _gpu("A100-40GB", 40, 1555, 312, PCIE4, "A100-SXM4-40GB", "A100-PCIE-40GB"),
        _gpu("A100-80GB", 80, 2039, 312, PCIE4, "A100-SXM4-80GB"),
        _gpu("A100-80GB-PCIe", 80, 1935, 312, PCIE4, "A100 80GB PCIe"),
        # NVIDIA H100 datasheet: SXM 3.35 TB/s, 1,979 TFLOPS with sparsity; NVL 3.9 TB/s, 1,671; PCIe 2 TB/s, 1,513.
        _gpu("H100-SXM", 80, 3350, 989.5, PCIE5, "H100 80GB HBM3"),
        _gpu("H100-PCIe", 80, 2000, 756.5, PCIE5, "H100 PCIe"),
        _gpu("H100-NVL", 94, 3900, 835.5, PCIE5, "H100 NVL"),
        # NVIDIA H200 datasheet (SXM): 141 GB, 4.8 TB/s, 1,979 TFLOPS with sparsity.
        _gpu("H200", 141, 4800, 989.5, PCIE5, "H200"),
        # NVIDIA DGX B200 datasheet, an eighth of it: 1,440 GB, 64 TB/s, 36 PFLOPS with sparsity.
        _gpu("B200", 180, 8000, 2250, PCIE5, "B200"),
        # NVIDIA L4 datasheet: 300 GB/s, 242 TFLOPS with sparsity. L40S datasheet: 864 GB/s, 362 dense.
        _gpu("L4", 24, 300, 121, PCIE4, "L4"),
        _gpu("L40S", 48, 864, 362, PCIE4, "L40S"),
        # NVIDIA A10G, made for AWS G5: 600 GB/s, 70 TFLOPS (its relative A10 has 125).
        _gpu("A10G", 24, 600, 70, PCIE4, "A10G"),
        # NVIDIA V100 datasheet (SXM2): 900 GB/s, 125 TFLOPS. T4 datasheet: 320 GB/s, 65 TFLOPS.
        _gpu("V100-16GB", 16, 900, 125, PCIE3, "V100-SXM2-16GB"),
        _gpu("V100-32GB", 32, 900, 125, PCIE3, "V100-SXM2-32GB"),
        _gpu("T4", 16, 320, 65, PCIE3, "T4"),
        # NVIDIA GA102, Ada and Blackwell RTX architecture papers: dense fp16 with fp32 accumulate.
        _gpu("RTX-3090", 24, 936, 71, PCIE4, "RTX 3090"),
        _gpu("RTX-4090", 24, 1008, 165.2, PCIE4, "RTX 4090"),
        _gpu("RTX-5090", 32, 1792, 209.5, PCIE5, "RTX 5090"),
        # AMD Instinct MI300X datasheet: 192 GB, 5.3 TB/s, 1,307.4 TFLOPS. For comparison; nothing here runs on it.
        _gpu("MI300X", 192, 5300, 1307.4, PCIE5),
    )
}
DEFAULT_GPU = "A100-80GB"


def gpu_named(name: str) -> GPU:
    """A known GPU, or with "auto" the one in this machine. Case, spaces and hyphens do not matter.

    Raises ValueError that lists the known ones, or says why none was found.
    """
    if name.strip().casefold() == "auto":
        return present_gpu()
    for gpu in GPUS.values():
        if _plain(gpu.name) == _plain(name):
            return gpu
    raise ValueError(f"gpu is {name!r}; known are auto, {', '.join(GPUS)}")


def present_gpu() -> GPU:
    """The GPU in this machine with the memory that the driver reports. Raises ValueError without one, or for one
    whose datasheet is not in the table."""
    if not device.on_gpu:
        raise ValueError(f"gpu is 'auto'; {device.reason}. Name one: known are {', '.join(GPUS)}")
    properties = device.xp.cuda.runtime.getDeviceProperties(0)
    gpu = gpu_of_driver(properties["name"].decode())
    return replace(gpu, memory_bytes=int(properties["totalGlobalMem"]))


def gpu_of_driver(driver_name: str) -> GPU:
    """The GPU that the driver calls so. An exact match: an RTX 4090 D or a laptop's 4090 is another chip."""
    short = re.sub(r"^(NVIDIA|Tesla|GeForce|\s)+", "", driver_name)
    for gpu in GPUS.values():
        if _plain(short) in map(_plain, gpu.driver_names):
            return gpu
    raise ValueError(
        f"gpu is 'auto'; this machine has a {driver_name}, whose datasheet is not in the table. "
        f"Name the nearest: {', '.join(GPUS)}"
    )


def several(gpu: GPU, count: int) -> GPU:
    """`count` GPUs as one, each with its share of every layer (tensor parallel). What they say to each other
    is not counted, so times are too good by that. Raises ValueError."""
    if count < 1:
        raise ValueError(f"num_gpus is {count}; at least 1 is needed")
    if count == 1:
        return gpu
    return replace(
        gpu,
        name=f"{count} x {gpu.name}",
        memory_bytes=count * gpu.memory_bytes,
        bandwidth=count * gpu.bandwidth,
        flops=count * gpu.flops,
        link=count * gpu.link,
        count=count,
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()
