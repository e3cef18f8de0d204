"""How logits are changed before a token is chosen, for all sequences of a step together, where the logits lie.

The meanings and their order are vLLM's. Only the places that a parameter names are touched: a penalty touches the
tokens that the sequence holds, a bias its tokens; `allowed_token_ids` and `min_p` touch whole rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.device import Array, xp
from .sampling_params import SamplingParams


@dataclass(slots=True)
class Row:
    """One row of logits, and what its sequence asks for. Arrays of token ids are int64, in host memory."""

    row: int
    params: SamplingParams
    allowed: np.ndarray | None  # no other tokens; None: all
    stop_ids: np.ndarray  # that end the sequence
    bad_words: Sequence[Sequence[int]]
    prompt_ids: np.ndarray  # each token of the prompt once
    counts: dict[int, int]  # token of the output -> how often it is there
    output: Sequence[int]  # the tokens generated so far


Places = list[tuple[int, np.ndarray]]  # a row, and the columns that are meant in it


def shape_logits(logits: Array, rows: Sequence[Row]) -> None:
    """Change `logits [num_rows, vocab_size]`, float32, in place: `rows` name those that are changed."""
    _keep_only(logits, [(row.row, row.allowed) for row in rows if row.allowed is not None])
    forbidden = [(row.row, _bad_word_ends(row)) for row in rows if row.bad_words]
    forbidden += [(row.row, row.stop_ids) for row in rows if len(row.output) < row.params.min_tokens]
    _set(logits, forbidden, -math.inf)
    biased = [(row.row, row.params.logit_bias) for row in rows if row.params.logit_bias]
    _add(logits, [(row, _ids(bias)) for row, bias in biased], [value for _, b in biased for value in b.values()])
    _penalize_repetition(logits, [row for row in rows if row.params.repetition_penalty != 1])
    _penalize_counts(logits, [row for row in rows if row.params.frequency_penalty or row.params.presence_penalty])
    _drop_unlikely(logits, [row for row in rows if row.params.min_p and row.params.temperature])


def _ids(ids: Iterable[int]) -> np.ndarray:
    return np.fromiter(ids, dtype=np.int64)


def _indices(places: Places) -> tuple[Array, Array]:
    """Rows and columns of all places, on the device."""
    rows = np.repeat([row for row, _ in places], [len(ids) for _, ids in places])
    columns = np.concatenate([ids for _, ids in places])
    return xp.asarray(rows.astype(np.int64)), xp.asarray(columns)


def _floats(values: Iterable[float]) -> Array:
    return xp.asarray(np.fromiter(values, dtype=np.float32))


def _set(logits: Array, places: Places, value: float) -> None:
    if places:
        logits[_indices(places)] = value


def _keep_only(logits: Array, places: Places) -> None:
    """Of the rows in `places`, the places stay, and all else becomes -inf."""
    if places:
        where = _indices(places)
        kept = logits[where]
        logits[xp.asarray(np.array([row for row, _ in places]))] = -math.inf
        logits[where] = kept


def _add(logits: Array, places: Places, values: Iterable[float]) -> None:
    """Add a value to each place, none of which is named twice."""
    if places:
        where = _indices(places)
        logits[where] = logits[where] + _floats(values)


def _bad_word_ends(row: Row) -> np.ndarray:
    """The last tokens of the bad words whose other tokens end the output."""
    output = row.output
    ends = [w[-1] for w in row.bad_words if list(output[len(output) - len(w) + 1 :]) == list(w[:-1])]
    return _ids(ends)


def _penalize_repetition(logits: Array, rows: Sequence[Row]) -> None:
    """Keskar et al. 2019: a logit above 0 is divided by the penalty, one below is multiplied."""
    # A token of both is named twice, and gets the same value twice.
    places = [(row.row, np.concatenate([row.prompt_ids, _ids(row.counts)])) for row in rows]
    if places:
        where = _indices(places)
        factors = np.repeat([row.params.repetition_penalty for row in rows], [len(ids) for _, ids in places])
        penalty, found = _floats(factors), logits[where]
        logits[where] = xp.where(found > 0, found / penalty, found * penalty)


def _penalize_counts(logits: Array, rows: Sequence[Row]) -> None:
    """For each token of the output, take away `frequency_penalty` as often as it is there, and `presence_penalty`."""
    rows = [row for row in rows if row.counts]
    values = [
        -(count * row.params.frequency_penalty + row.params.presence_penalty)
        for row in rows
        for count in row.counts.values()
    ]
    _add(logits, [(row.row, _ids(row.counts)) for row in rows], values)


def _drop_unlikely(logits: Array, rows: Sequence[Row]) -> None:
    """min_p: a token less likely than so much of the likeliest one, at the row's temperature, becomes -inf."""
    if rows:
        where = xp.asarray(np.array([row.row for row in rows]))
        found = logits[where]  # [len(rows), vocab_size]
        below = _floats(row.params.temperature * math.log(row.params.min_p) for row in rows)
        least = found.max(axis=-1) + below  # [len(rows)]
        logits[where] = xp.where(found < least[:, None], np.float32(-math.inf), found)
