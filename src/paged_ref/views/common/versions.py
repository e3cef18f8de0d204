"""The versions of the packages that this one builds on, for `paged-ref info` and for recorded results."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

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
