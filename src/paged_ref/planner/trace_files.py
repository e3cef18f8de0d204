"""Traces from files: Azure, Mooncake, ShareGPT lengths, and plain columns.

Nothing is skipped: a row that is wrong ends the reading, with the number of its line.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from ..extras.reading import parse_json, read_text
from .traces import MEANS, RequestTrace, TraceRequest, first, generated

# The columns of prompt tokens, output tokens and time, by what a header must have to be of that form.
AZURE = ("ContextTokens", "GeneratedTokens", "TIMESTAMP")
SHAREGPT = ("num_prefill_tokens", "num_decode_tokens")

HASH_BLOCK = 512  # tokens that one of Mooncake's hash_ids stands for

Line = tuple[int, str]  # its number in the file, from 1, and its text


def read_trace(path: str | Path) -> RequestTrace:
    """A trace from a file, plain or gzip. Its first line says which form it has:

    Azure CSV (TIMESTAMP, ContextTokens, GeneratedTokens), ShareGPT CSV (num_prefill_tokens,
    num_decode_tokens), Mooncake JSON lines (timestamp in ms, input_length, output_length, hash_ids), or two
    columns of prompt and output tokens, with or without a header. Raises ValueError that names the line.
    """
    path = Path(path)
    try:
        text = read_text(path, unpack=True).removeprefix("\ufeff")
    except ValueError as error:
        raise ValueError(f"trace {error}") from None
    rows = enumerate(io.StringIO(text, newline=None), start=1)
    try:
        requests, timed = _read([(number, row) for number, line in rows if (row := line.strip())])
    except ValueError as error:
        raise ValueError(f"trace {path}: {error}") from None
    began = tuple(replace(each, arrival=each.arrival - requests[0].arrival) for each in requests)
    return RequestTrace(path.name.removesuffix(".gz"), began, timed)


def trace_named(name: str, num_requests: int, num_drawn: int, seed: int = 0) -> RequestTrace:
    """The first `num_requests` of a file (0: all), or as many (0: `num_drawn`) drawn as "sharegpt" or "alpaca"."""
    if name in MEANS:
        return generated(name, num_requests or num_drawn, seed)
    trace = read_trace(name)
    return first(trace, num_requests) if num_requests else trace


def _read(lines: list[Line]) -> tuple[list[TraceRequest], bool]:
    """The requests, and whether the file has times."""
    if not lines:
        raise ValueError("it is empty")
    header = _cells(lines[0][1])
    if lines[0][1].startswith("{"):
        rows, timed = _json_lines(lines), True
    elif set(header) >= set(AZURE):
        rows, timed = _table(header, AZURE, lines[1:]), True
    elif set(header) >= set(SHAREGPT):
        rows, timed = _table(header, SHAREGPT, lines[1:]), False
    elif len(header) == 2:
        has_header = not any(cell.lstrip("+-").isdigit() for cell in header)
        rows, timed = _table(["prompt", "output"], ("prompt", "output"), lines[has_header:]), False
    else:
        raise ValueError(
            f"line {lines[0][0]} begins none of the known forms: Azure or ShareGPT columns, "
            "Mooncake JSON, or two columns of prompt and output tokens"
        )
    requests: list[TraceRequest] = []
    for number, request in rows:
        if requests and request.arrival < requests[-1].arrival:
            early = requests[-1].arrival - request.arrival
            raise ValueError(f"line {number}: times out of order; it is {early:.3f} s before the request above it")
        requests.append(request)
    if not requests:
        raise ValueError("it has a header and no requests")
    return requests, timed


def _cells(text: str) -> list[str]:
    return [cell.strip() for cell in text.split(",")] if "," in text else text.split()


def _table(header: list[str], columns: tuple[str, ...], lines: list[Line]) -> Iterator[tuple[int, TraceRequest]]:
    """Rows of columns: those of prompt tokens, output tokens and, where there is one, time."""
    places = [header.index(column) for column in columns]
    for number, text in lines:
        cells = _cells(text)
        if len(cells) != len(header):
            raise ValueError(f"line {number} has {len(cells)} columns; {len(header)} are needed")
        prompt, output = (_count(number, header[place], cells[place]) for place in places[:2])
        arrival = _seconds(number, cells[places[2]]) if len(places) > 2 else 0.0
        yield number, TraceRequest(arrival, prompt, output)


def _count(number: int, column: str, cell: str) -> int:
    if not cell.isdecimal() or len(cell) > 12 or int(cell) < 1:
        raise ValueError(f"line {number}: {column} is {cell[:20]!r}; a whole number of at least 1 is needed")
    return int(cell)


def _seconds(number: int, cell: str) -> float:
    try:
        moment = datetime.fromisoformat(cell)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except ValueError:
        raise ValueError(f"line {number}: TIMESTAMP is {cell[:40]!r}; a date and time is needed") from None


def _json_lines(lines: list[Line]) -> Iterator[tuple[int, TraceRequest]]:
    for number, text in lines:
        try:
            row = parse_json(text)
        except ValueError as error:
            raise ValueError(f"line {number} is {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        for key, least in (("timestamp", 0), ("input_length", 1), ("output_length", 1)):
            if type(row.get(key)) is not int or row[key] < least:
                raise ValueError(
                    f"line {number}: {key} is {row.get(key)!r}; a whole number of at least {least} is needed"
                )
        ids = row.get("hash_ids", [])
        if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < 2**62 for each in ids):
            raise ValueError(f"line {number}: hash_ids is not a list of whole numbers")
        blocks = -(-row["input_length"] // HASH_BLOCK)
        if ids and len(ids) != blocks:
            raise ValueError(
                f"line {number} has {len(ids)} hash_ids; {row['input_length']} tokens are {blocks} blocks "
                f"of {HASH_BLOCK}"
            )
        yield number, TraceRequest(row["timestamp"] / 1000, row["input_length"], row["output_length"], tuple(ids))
