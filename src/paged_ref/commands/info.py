"""`paged-ref info`: what this machine can run, and why not the rest."""

from __future__ import annotations

import argparse
import platform

from rich import box
from rich.table import Table

from .. import __version__
from ..core import device
from ..core.attention.attention import known_backends, why_not
from ..views.common.console import Console
from ..views.common.versions import describe_device, versions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def main(args: argparse.Namespace) -> int:
    console = Console()
    console.print(f"paged_ref {__version__}, Python {platform.python_version()}, {platform.platform()}")
    console.print(f"Device: {describe_device()}; arrays are {device.xp.__name__} ({device.reason})")
    backends = Table("backend", "here", "what it is", box=box.SIMPLE)
    for name, what in known_backends().items():
        backends.add_row(name, "yes" if why_not(name) is None else f"no: {why_not(name)}", what)
    console.print(backends)
    packages = Table("package", "version", box=box.SIMPLE)
    for name, number in versions().items():
        packages.add_row(name, number or "-")
    console.print(packages)
    return 0
