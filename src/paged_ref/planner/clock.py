"""The simulated clock: roofline.step_seconds for one GPU and one model, with all that is fixed multiplied out.

A test holds the two together; this one is asked for every step of millions of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..core.memory.manager import Transfer
from .hardware import GPU
from .models import ModelSpec
from .roofline import CONSTANTS, Constants, step_time, transfer_seconds


class Clock:
    """Seconds of steps and transfers."""

    def __init__(self, gpu: GPU, model: ModelSpec, constants: Constants = CONSTANTS) -> None:
        # step_time is linear in its four counts, so five of its answers hold all others.
        def sides(*counts: int) -> tuple[float, float]:
            tokens, kv, pairs, logits = counts
            time = step_time(
                gpu, model, tokens, kv, query_key_pairs=pairs, num_logits=logits, constants=constants
            )  # fmt: skip
            return time.weights + time.kv, time.compute

        self._weights = sides(0, 0, 0, 0)[0]
        self._kv = sides(0, 1, 0, 0)[0] - self._weights
        self._token, self._pair, self._logit = (sides(*one)[1] for one in ((1, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)))
        self._overhead = constants.step_overhead
        self._gpu, self._constants = gpu, constants
        self._bandwidth = gpu.bandwidth * constants.bandwidth_share
        self._arrays = 2 * model.num_layers  # K and V of each layer lie apart, and each run of rows is a copy in each
        self._kv_bytes = model.kv_bytes_per_token

    def step(self, num_tokens: int, kv_tokens_read: int, pairs: int, num_logits: int) -> float:
        """Seconds of a step; the arguments are those of roofline.step_time."""
        read = self._weights + self._kv * kv_tokens_read
        compute = self._token * num_tokens + self._pair * pairs + self._logit * num_logits
        return (read if read > compute else compute) + self._overhead

    def decode(self, num_seqs: int, kv_tokens_read: int) -> float:
        """Seconds of a step in which each of the sequences computes one token."""
        return self.step(num_seqs, kv_tokens_read, kv_tokens_read, num_seqs)

    def transfers(self, transfers: Iterable[Transfer], row_tokens: int) -> tuple[float, int, int]:
        """(seconds, bytes on the device, bytes over the link). A row is `row_tokens` tokens.

        Each transfer is one copy in each array. What moves on the device is read and written. The step waits
        for them: nothing is hidden behind other work.
        """
        seconds, on_device, over_link = 0.0, 0, 0
        for transfer in transfers:
            num_bytes = transfer.count * row_tokens * self._kv_bytes
            if transfer.kind in ("copy", "move"):
                on_device += num_bytes
                seconds += 2 * num_bytes / self._bandwidth
            else:
                over_link += num_bytes
                seconds += transfer_seconds(self._gpu, num_bytes, self._arrays, self._constants)
        return seconds, on_device, over_link
