"""Log-probabilities of tokens, in vLLM's form: for each token a dict from token id to Logprob.

They are of the logits as the model gave them, before penalties, masks and the temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.device import Array, to_host, xp

PART = 1 << 24  # logits that are worked on at the same time


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one token at one place."""

    logprob: float  # natural logarithm of its probability
    rank: int  # 1: the likeliest token
    decoded_token: str | None  # its text alone; None without a tokenizer


def token_logprobs(
    logits: Array, chosen: Sequence[int], counts: Sequence[int], text: Callable[[int], str | None]
) -> list[dict[int, Logprob]]:
    """For each row of `logits [num_rows, vocab_size]`: the `chosen` token first, then the likeliest `counts` tokens.

    A count of -1 stands for the whole vocabulary. `text` gives the text of a token.
    """
    vocab_size = logits.shape[1]
    sizes = [vocab_size if count < 0 else count for count in counts]
    found: list[dict[int, Logprob]] = []
    most = max(1, PART // vocab_size)  # rows at the same time
    for first in range(0, len(chosen), most):
        part = slice(first, first + most)
        found += _of_part(logits[part], chosen[part], sizes[part], text)
    return found


def _of_part(
    logits: Array, chosen: Sequence[int], sizes: Sequence[int], text: Callable[[int], str | None]
) -> list[dict[int, Logprob]]:
    below = logits - logits.max(axis=1, keepdims=True)
    values = below - xp.log(xp.exp(below).sum(axis=1, keepdims=True))  # [num_rows, vocab_size]
    rows, ids = xp.arange(len(chosen)), xp.asarray(np.array(chosen, dtype=np.int64))
    own = values[rows, ids]  # [num_rows]
    ranks = to_host((values > own[:, None]).sum(axis=1) + 1).tolist()
    most = max(1, *sizes)
    top = xp.argpartition(-values, min(most, values.shape[1]) - 1, axis=1)[:, :most]  # [num_rows, most], in no order
    top_values, top_ids, own_values = to_host(values[rows[:, None], top]), to_host(top), to_host(own).tolist()
    found = []
    for row, (token_id, size) in enumerate(zip(chosen, sizes, strict=True)):
        entries = {token_id: Logprob(own_values[row], ranks[row], text(token_id))}
        order = np.lexsort([top_ids[row], -top_values[row]])[:size]  # the likeliest first, then by id
        for rank, place in enumerate(order.tolist()):
            other = int(top_ids[row, place])
            entries[other] = Logprob(float(top_values[row, place]), rank + 1, text(other))
        found.append(entries)
    return found
