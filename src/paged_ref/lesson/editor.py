"""The reader's editor, at a line of a file."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

_PLUS = {"vi", "vim", "nvim", "nano", "pico", "emacs", "emacsclient", "micro", "joe", "gedit", "kak"}
_GOTO = {"code", "code-insiders", "codium", "cursor"}


def editor_command(path: Path, line: int) -> list[str]:
    """What opens the file at the line. Raises ValueError, in words, where $VISUAL and $EDITOR name no editor."""
    setting = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""
    try:
        words = shlex.split(setting)
    except ValueError as error:
        raise ValueError(f"the editor is {setting!r}, which is no command: {error}") from None
    if not words:
        raise ValueError("no editor is set: export EDITOR=nano, or another one, before the lesson")
    name = Path(words[0]).name
    if name in _GOTO:
        return [*words, "--goto", f"{path}:{line}"]
    return [*words, f"+{line}", str(path)] if name in _PLUS else [*words, str(path)]


def edit(path: Path, line: int) -> None:
    """Open the file in the reader's editor, and wait for the editor. Raises ValueError, in words."""
    command = editor_command(path, line)
    try:
        status = subprocess.run(command, check=False).returncode
    except OSError as error:
        raise ValueError(f"the editor {command[0]} cannot be started: {error.strerror}") from None
    if status:
        raise ValueError(f"the editor {command[0]} ended with status {status}")


def line_of(path: Path, name: str) -> int:
    """The line on which the file defines `name`; 1 if it does not."""
    starts = (f"def {name}(", f"class {name}(", f"class {name}:")
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 1
    return next((number for number, line in enumerate(lines, 1) if line.startswith(starts)), 1)
