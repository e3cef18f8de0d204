"""An error of code that the reader wrote, in words."""

from __future__ import annotations

import traceback
from pathlib import Path


def error_in_words(error: BaseException, file: str) -> str:
    """The error, after the last line of the reader's file that ran, if one did. A KernelError names its own line."""
    if isinstance(error, SyntaxError):
        place = f"line {error.lineno} of {Path(error.filename or file).name}, `{(error.text or '').strip()}`"
        return f"{place}: {type(error).__name__}: {error.msg}"
    what = f"there is no key {error}" if isinstance(error, KeyError) and error.args else str(error)
    said = f"{type(error).__name__}: {what}".removesuffix(": ")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"line {frames[-1].lineno} of {Path(file).name}, `{frames[-1].line}`: {said}" if frames else said
