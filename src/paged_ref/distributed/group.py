"""A group of ranks, and what they say to each other in a step. mpi.py carries it, and in lessons threads do.

A step with `tokens` tokens and `rows` rows of logits says, as 4-byte numbers, whatever the model's dtype is:

    broadcast   plan.plan_bytes(...)                        by rank 0, to each other rank
    reduced     2 * num_layers * tokens * hidden_size * 4   summed over the ranks
    gathered    rows * vocab_size * 4                       the parts of all ranks, on rank 0

These are sizes of buffers. A ring all-reduce sends 2 (size - 1) / size of its buffer from each rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter

import numpy as np

from ..core.device import Array, to_host, xp


class GroupError(RuntimeError):
    """A rank is gone, or out of step, so no other one can go on. The message is one sentence."""


class GroupClosed(Exception):  # noqa: N818 (no error)
    """Rank 0 has no more work."""


class Group(ABC):
    """The place of this process, or thread, among the ranks. All ranks sum and gather in the same order.

    Every method raises GroupError where a rank is gone, and on ranks other than 0 GroupClosed.
    """

    rank: int
    size: int

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()  # of buffers so far, as above
        self.seconds = 0.0  # in which this rank waited for messages to go or come
        self.in_step = False  # from a plan to its logits

    def __repr__(self) -> str:
        return f"a group of {self.size} ranks"

    def broadcast(self, plan: np.ndarray) -> None:
        """Send `plan [any] int32` from rank 0 to the others. A step that was interrupted before its end is an error:
        the others still wait for its sums."""
        if self.in_step:
            raise GroupError("a step was interrupted, and the ranks are out of step; make a new group")
        self.in_step = True
        for rank in range(1, self.size):
            self._send(rank, plan)
        self.bytes["broadcast"] += plan.nbytes

    def sum(self, part: Array) -> Array:
        """The sum of all ranks' parts, on every rank, in the shape and dtype of `part`. Added up in float32."""
        total = xp.asarray(self._sum(np.ascontiguousarray(to_host(part), dtype=np.float32)))
        self.bytes["reduced"] += 4 * part.size
        return total.astype(part.dtype, copy=False)

    def gather(self, part: Array) -> Array:
        """The ranks' `part [rows, own columns]` side by side, in float32: [rows, columns] on rank 0."""
        parts = [np.ascontiguousarray(to_host(part), dtype=np.float32)]
        if self.rank:
            self._send(0, parts[0])
        else:
            taken = [self.take(rank, np.float32) for rank in range(1, self.size)]
            parts += [theirs.reshape(len(part), theirs.size // max(1, len(part))) for theirs in taken]
        self.in_step = False
        whole = np.concatenate(parts, axis=1)
        self.bytes["gathered"] += whole.nbytes
        return xp.asarray(whole)

    @abstractmethod
    def _send(self, rank: int, buffer: np.ndarray) -> None: ...

    @abstractmethod
    def take(self, rank: int, dtype: type) -> np.ndarray:
        """The next buffer that `rank` has sent here: [any] dtype."""

    @abstractmethod
    def _sum(self, part: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def close(self, reason: str = "") -> None:
        """Rank 0 has no more work: the others get GroupClosed, or with a `reason` GroupError."""
