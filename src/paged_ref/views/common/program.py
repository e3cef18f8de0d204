"""How the reader starts this program: printed advice can be pasted as it is."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

SCRIPT = "paged-ref"


def program() -> str:
    """`paged-ref` where the PATH finds this installation's, else its path, such as `.venv/bin/paged-ref`;
    `python -m paged_ref` where the program was started so, or has no script."""
    started = Path(sys.argv[0])
    script = started.absolute() if started.name == SCRIPT else Path(sys.executable).with_name(SCRIPT)
    if started.name == "__main__.py" or not script.exists():
        return f"{short_path(Path(sys.orig_argv[0]))} -m paged_ref"
    found = shutil.which(SCRIPT)
    return SCRIPT if found and Path(found).samefile(script) else short_path(script)


def short_path(path: Path) -> str:
    """From the current directory, where the path lies below it. A name without a folder is left to the PATH."""
    if not (path.is_absolute() and path.is_relative_to(Path.cwd())):
        return str(path)
    below = path.relative_to(Path.cwd())
    return str(below) if len(below.parts) > 1 else f"./{below}"
