"""The machine and the versions of the packages that this one builds on, for `paged-ref info` and recorded results."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from ...core.device import on_gpu, xp
from ...tuned.threads import cores

PACKAGES = (
    "numpy", "numba", "llvmlite", "numba-cuda", "cupy-cuda12x", "cupy-cuda13x",
    "safetensors", "tokenizers", "rich", "torch", "triton", "transformers",
)  # fmt: skip


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """The version of each package; None where it is not installed."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_device() -> str:
    """The device in words."""
    if on_gpu:
        properties = xp.cuda.runtime.getDeviceProperties(0)
        return f"{properties['name'].decode()}, {properties['totalGlobalMem'] / 2**30:.0f} GiB"
    return f"CPU, {cores()} cores"
