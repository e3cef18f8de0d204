"""Traces from files: this project's own form, Azure, BurstGPT, Mooncake, ShareGPT lengths, and plain columns.

A row that cannot be read ends the reading with the number of its line, or is left out and counted. A column that is
not used is named.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..core.checks import plural
from ..extras.reading import parse_json, read_text
from .traces import DRAWN, MEANS, RequestTrace, TraceRequest, generated, spread

TIME, PROMPT, OUTPUT, GROUP, PREFIX = "time", "prompt_tokens", "output_tokens", "prefix_group", "prefix_tokens"
# Each form of a table: its columns of prompt tokens, output tokens, time and a shared beginning, in lower case. The
# first two must be there.
TABLES = (
    (PROMPT, OUTPUT, TIME, GROUP, PREFIX),
    ("contexttokens", "generatedtokens", "timestamp"),  # Azure
    ("request tokens", "response tokens", "timestamp"),  # BurstGPT
    ("num_prefill_tokens", "num_decode_tokens", "arrived_at"),  # ShareGPT, as Sarathi-Serve and Vidur have it
)
MOONCAKE = ("timestamp", "input_length", "output_length", "hash_ids")  # JSON lines
FORMS = (
    "a file, plain or gzip: CSV or JSON lines with time (seconds, or a date), prompt_tokens, output_tokens and, where "
    "requests begin with the same tokens, prefix_group and prefix_tokens, as in "
    '{"time": 0.5, "prompt_tokens": 900, "output_tokens": 120, "prefix_group": "help", "prefix_tokens": 512}; '
    "the columns of Azure, BurstGPT, Mooncake or ShareGPT; or two columns of prompt and output tokens"
)
HASH_BLOCK = 512  # tokens that one of Mooncake's hash_ids stands for
LEAST_BLOCK = 8  # tokens: a shared beginning is counted in such blocks, if the prefix_tokens have no larger divisor
MOST_TOKENS = 10**9

Line = tuple[int, str]  # its number in the file, from 1, and its text


@dataclass(slots=True)
class Row:
    """One request of a file."""

    arrival: float
    prompt: int
    output: int
    hash_ids: tuple[int, ...] = ()  # Mooncake's
    group: str = ""  # requests of one group begin with the same `prefix` tokens, or as many as both have
    prefix: int = 0


Parser = Callable[[int, str], Row]  # of a line; raises ValueError with the number of the line


def read_trace(path: str | Path, *, skip_bad_rows: bool = False) -> RequestTrace:
    """A trace from a file, whose first line says which of the FORMS it has. Raises ValueError that names the line of
    the first row that cannot be read, unless such rows are to be skipped."""
    path = Path(path)
    try:
        text = read_text(path, unpack=True).removeprefix("\ufeff")
    except ValueError as error:
        raise ValueError(f"trace {error}") from None
    numbered = enumerate(io.StringIO(text, newline=None), start=1)
    try:
        rows, timed, notes = _read([(number, row) for number, line in numbered if (row := line.strip())], skip_bad_rows)
    except ValueError as error:
        raise ValueError(f"trace {path}: {error}") from None
    hash_ids, hash_block = _hash_ids(rows)
    requests = tuple(
        TraceRequest(row.arrival - rows[0].arrival, row.prompt, row.output, ids)
        for row, ids in zip(rows, hash_ids, strict=True)
    )
    return RequestTrace(path.name.removesuffix(".gz"), requests, timed, tuple(notes), hash_block)


def trace_named(name: str, num_requests: int, seed: int = 0, *, skip_bad_rows: bool = False) -> RequestTrace:
    """`num_requests` spread over a file (0: all), or as many (0: DRAWN) drawn as "sharegpt" or "alpaca"."""
    if name in MEANS:
        return generated(name, num_requests or DRAWN, seed)
    trace = read_trace(name, skip_bad_rows=skip_bad_rows)
    return spread(trace, num_requests) if num_requests else trace


def _read(lines: list[Line], skip_bad_rows: bool) -> tuple[list[Row], bool, list[str]]:
    """The rows, whether the file has times, and what is to be said about the reading."""
    if not lines:
        raise ValueError("it is empty")
    parse: Parser
    if lines[0][1].startswith("{"):
        parse, timed, has_header, notes = _json_row, True, False, _unused_keys(lines[0][1])
    else:
        parse, timed, has_header, notes = _table(*lines[0])
    rows: list[Row] = []
    bad: list[str] = []
    for number, text in lines[has_header:]:
        try:
            row = parse(number, text)
            if rows and row.arrival < rows[-1].arrival:
                early = rows[-1].arrival - row.arrival
                raise ValueError(f"line {number}: times out of order; it is {early:.3f} s before the request above it")
        except ValueError as error:
            if not skip_bad_rows:
                raise
            bad.append(str(error))
        else:
            rows.append(row)
    if not rows:
        raise ValueError(f"none of its rows can be read; {bad[0]}" if bad else "it has a header and no requests")
    if bad:
        notes.append(
            f"{len(bad):,} of {len(lines) - has_header:,} rows cannot be read and are left out; the first: {bad[0]}"
        )
    return rows, timed, notes


# --- tables --------------------------------------------------------------------------------------------


def _cells(text: str) -> list[str]:
    if '"' in text:
        return [cell.strip() for cell in next(csv.reader([text], skipinitialspace=True))]
    return [cell.strip() for cell in text.split(",")] if "," in text else text.split()


def _table(number: int, first: str) -> tuple[Parser, bool, bool, list[str]]:
    """How to read the rows below the first line, whether they have times, whether this line is a header, and notes."""
    names = _cells(first)
    header = [cell.casefold() for cell in names]
    has_header = not any(_is_number(cell) for cell in header)
    known = next((columns for columns in TABLES if set(columns[:2]) <= set(header)), None)
    if known is None and len(header) == 2:
        names = header = [PROMPT, OUTPUT]
        known = TABLES[0]
    elif known is None and len(header) == 3 and not has_header:
        names = header = [TIME, PROMPT, OUTPUT]
        known = TABLES[0]
    if known is None:
        raise ValueError(
            f"line {number} begins none of the known forms: columns {TIME}, {PROMPT} and {OUTPUT}, those of Azure, "
            "BurstGPT or ShareGPT, Mooncake JSON, or two columns of prompt and output tokens"
        )
    for name in known:
        if header.count(name) > 1:
            raise ValueError(f"line {number} has {header.count(name)} columns {name}; one is needed")
    used = known if GROUP in header else known[:3]  # without a group, no beginnings are shared
    notes = _note_unused(name for name, plain in zip(names, header, strict=True) if plain not in used)
    places = {key: header.index(name) for key, name in zip(TABLES[0], known, strict=False) if name in header}
    named = {key: names[place] for key, place in places.items()}

    def parse(number: int, text: str) -> Row:
        cells = _cells(text)
        if len(cells) != len(header):
            raise ValueError(f"line {number} has {plural(len(cells), 'column')}; {len(header)} needed")
        return _row(number, {key: cells[place] for key, place in places.items()}, named)

    return parse, TIME in places, has_header, notes


def _note_unused(names: Iterable[str]) -> list[str]:
    words = ", ".join(names)
    return [f"columns that are not used: {words}"] if words else []


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _row(number: int, cells: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    """A request from its cells, by the names of TABLES[0]; `names` are those of the file."""
    prompt, output = (_count(number, names[key], cells[key]) for key in (PROMPT, OUTPUT))
    arrival = _seconds(number, names[TIME], cells[TIME]) if TIME in cells else 0.0
    group = str(cells.get(GROUP) or "")
    if not group:
        return Row(arrival, prompt, output)
    prefix = _count(number, PREFIX, cells.get(PREFIX, ""))
    if prefix > prompt:
        raise ValueError(f"line {number}: {PREFIX} is {prefix}; the length of the prompt is {prompt}")
    return Row(arrival, prompt, output, group=group, prefix=prefix)


def _count(number: int, column: str, cell: Any) -> int:
    text = str(cell)
    if isinstance(cell, bool) or not text.isdecimal() or len(text) > 12 or not 1 <= int(text) <= MOST_TOKENS:
        shown = repr(text) if len(text) <= 40 else f"{text[:40]!r}... ({len(text)} characters)"
        raise ValueError(f"line {number}: {column} is {shown}; a whole number from 1 to {MOST_TOKENS:,} is needed")
    return int(text)


def _seconds(number: int, column: str, cell: Any) -> float:
    """Seconds, or a date and time."""
    try:
        seconds = float(cell)
        if math.isfinite(seconds):
            return seconds
    except (ValueError, TypeError):
        try:
            moment = datetime.fromisoformat(cell)
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, TypeError):
            pass
    raise ValueError(f"line {number}: {column} is {str(cell)[:40]!r}; seconds, or a date and time, are needed")


# --- JSON lines ----------------------------------------------------------------------------------------


def _unused_keys(text: str) -> list[str]:
    """What is to be said about the keys of the first line."""
    try:
        row = parse_json(text)
    except ValueError:
        return []  # the line itself says why
    used = TABLES[0] if PROMPT in row or OUTPUT in row else MOONCAKE
    return _note_unused(key for key in row if key not in used)


def _json_row(number: int, text: str) -> Row:
    try:
        row = parse_json(text)
    except ValueError as error:
        raise ValueError(f"line {number} is {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is not a JSON object")
    if PROMPT in row or OUTPUT in row:
        for key in (TIME, PROMPT, OUTPUT):
            if key not in row:
                raise ValueError(f"line {number} has no {key}")
        return _row(number, row, {key: key for key in TABLES[0]})
    for key, least in zip(MOONCAKE[:3], (0, 1, 1), strict=True):
        if type(row.get(key)) is not int or not least <= row[key] <= (10**15 if key == "timestamp" else MOST_TOKENS):
            raise ValueError(f"line {number}: {key} is {row.get(key)!r}; a whole number of at least {least} is needed")
    ids = row.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < 2**62 for each in ids):
        raise ValueError(f"line {number}: hash_ids is not a list of whole numbers")
    blocks = -(-row["input_length"] // HASH_BLOCK)
    if ids and len(ids) != blocks:
        raise ValueError(
            f"line {number} has {plural(len(ids), 'hash_id')}; input_length {row['input_length']} asks for {blocks}"
        )
    return Row(row["timestamp"] / 1000, row["input_length"], row["output_length"], tuple(ids))


# --- shared beginnings ---------------------------------------------------------------------------------


def _hash_ids(rows: list[Row]) -> tuple[list[tuple[int, ...]], int]:
    """The hash ids of each row, and the tokens that one stands for. The beginning of a group gets ids of its own, for
    whole blocks."""
    if not any(row.group for row in rows):
        return [row.hash_ids for row in rows], HASH_BLOCK
    block = max(LEAST_BLOCK, math.gcd(*(row.prefix for row in rows)))
    numbers: dict[tuple[str, int], int] = {}  # (group, block of its beginning) -> id
    ids = [
        tuple(numbers.setdefault((row.group, place), len(numbers)) for place in range(row.prefix // block))
        for row in rows
    ]
    return ids, block
