"""How every file from elsewhere is read: a regular file, no more of it than a limit, and all JSON by one reader.

Every refusal is a ValueError of one sentence that names the file and, where there is one, the place in it.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import stat
import zlib
from pathlib import Path
from typing import Any, BinaryIO

MIB = 1 << 20
JSON_LIMIT = 64 * MIB  # bytes; the index of the largest checkpoints, and their tokenizers, are below 40 MiB
FILE_LIMIT = 4096 * MIB  # of texts, traces and logs, which are held in memory
# Text and numbers become 3 to 20 times smaller. What becomes much smaller than that was made to fill the memory.
MOST_UNPACKED = 50  # times the size of the packed file, beyond the first 16 MiB
MOST_NESTED = 100  # arrays and objects inside each other
MOST_DIGITS = 19  # of an integer: as many as 64 bits need

# A string, an opening bracket, a closing one, or a number. Each alternative consumes what it begins with.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]|-?\d[\d.eE+-]*', re.DOTALL)


def open_file(path: Path, limit: int = FILE_LIMIT) -> BinaryIO:
    """Open a regular file of at most `limit` bytes. A pipe, a device or a directory is refused, and not waited for."""
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115  (the caller closes it)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path} cannot be read: it is a pipe or a device; a regular file is needed")
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        file.close()
        raise ValueError(f"{path} has {size} bytes; at most {limit} are read")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe that nothing writes to would block


def read_file(path: Path, limit: int = FILE_LIMIT, *, unpack: bool = False) -> bytes:
    """The bytes of a regular file, at most `limit` of them; with `unpack`, those inside a gzip file."""
    with open_file(path, limit) as file:
        size = os.fstat(file.fileno()).st_size
        packed = unpack and file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            return file.read(size)
        most = min(limit, max(16 * MIB, MOST_UNPACKED * size))
        content = bytearray()
        try:
            with gzip.open(file) as unpacked:
                while piece := unpacked.read(MIB):
                    content += piece
                    if len(content) > most:
                        raise ValueError(
                            f"{path} has {size} bytes and unpacks to more than {most}; at most that many are read"
                        )
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        return bytes(content)


def read_text(path: Path, limit: int = FILE_LIMIT, *, unpack: bool = False) -> str:
    """The same as text in UTF-8."""
    try:
        return read_file(path, limit, unpack=unpack).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: byte {error.start} is wrong") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    text = read_text(path, JSON_LIMIT)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; a JSON object is needed")
    return value


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, "not JSON: what at which place".

    What is nested deeper than MOST_NESTED, and a number that needs more than 64 bits, is refused: Python's own reader
    ends in a RecursionError, or gives an integer of any length.
    """
    depth = 0
    for token in _TOKEN.finditer(text):
        first = text[token.start()]
        if first in "[{":
            depth += 1
            if depth > MOST_NESTED:
                raise ValueError(_not_json(f"nested more than {MOST_NESTED} deep", text, token.start()))
        elif first in "]}":
            depth -= 1
        elif first != '"' and _is_too_large(token[0]):
            raise ValueError(_not_json("a number that needs more than 64 bits", text, token.start()))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(_not_json(error.msg.removesuffix(" at"), text, error.pos)) from None


def _is_too_large(number: str) -> bool:
    if number.lstrip("-").isdigit():
        return len(number.lstrip("-")) > MOST_DIGITS
    try:
        return abs(float(number)) == float("inf")
    except ValueError:
        return False  # no number at all: json.loads says so


def _not_json(what: str, text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return f"not JSON: {what} at {f'line {line}, ' if line > 1 else ''}column {column}"
