"""Decode steps of the whole model as CUDA graphs: recorded once for each size of batch, then replayed.

At decode a kernel runs for a few microseconds, and the host takes longer than that to launch it; a graph launches
hundreds at once. A recording has its addresses and shapes fixed. So the inputs are copied to arrays of its own,
and a batch is filled up to the next recorded size with sequences of no keys, whose tokens are written nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..device import Array, xp
from ..model.llama import Attend, Llama, StepInputs, attend

# Takes what computes logits; gives what computes them again into the same array, and that array.
Record = Callable[[Callable[[], Array]], tuple[Callable[[], None], Array]]


class CudaRecorder:
    """Records work on CuPy arrays. Its graphs share one pool of memory, which nobody else gets: what a replay
    overwrites must not be someone's by then."""

    def __init__(self) -> None:
        self._stream = xp.cuda.Stream(non_blocking=True)  # the default stream cannot be recorded
        self._pool = xp.cuda.MemoryPool()

    def __call__(self, run: Callable[[], Array]) -> tuple[Callable[[], None], Array]:
        """Raises RuntimeError where the work waits for the device, which no graph can, and where CuPy refuses to
        record: up to this day all that calls cuBLAS, and so every product (cupy/cupy issue 6290)."""
        current = xp.cuda.get_current_stream()
        self._stream.wait_event(current.record())
        with self._stream, xp.cuda.using_allocator(self._pool.malloc):
            run()  # compiles and loads what is not there yet: that cannot be recorded
            self._stream.synchronize()
            self._stream.begin_capture()
            try:
                logits = run()
                graph = self._stream.end_capture()
            except Exception as error:
                with suppress(Exception):  # it may have ended
                    self._stream.end_capture()
                raise RuntimeError(f"the decode step cannot be recorded as a CUDA graph: {error}") from error
        return (lambda: graph.launch()), logits  # on the stream that is current then


@dataclass
class _Step:
    """One recording: its own inputs, what replays it, and where the logits appear."""

    inputs: StepInputs
    replay: Callable[[], None]
    logits: Array


class RecordedDecode:
    """A model whose decode steps are recorded; all other steps run as they are. It has Llama's `forward`."""

    def __init__(self, model: Llama, record: Record | None = None) -> None:
        self.model = model
        self.num_replays = 0
        self._record = record or CudaRecorder()
        self._steps: dict[tuple[int, int], _Step] = {}
        self._bound: tuple[Any, Attend] | None = None  # what the recordings work on

    def forward(self, inputs: StepInputs, kv: Sequence[tuple[Array, Array]], attend: Attend = attend) -> Array:
        """As Llama.forward; in a decode step, an array that the next step overwrites."""
        if self._bound is None:
            self._bound = (kv, attend)
        num_seqs = inputs.seq_lens.shape[0]
        decode = num_seqs == inputs.token_ids.shape[0] == inputs.logits_rows.shape[0]
        if not decode or inputs.block_tables is None or self._bound[0] is not kv or self._bound[1] is not attend:
            return self.model.forward(inputs, kv, attend)
        size = (filled_batch(num_seqs), next_power_of_two(inputs.block_tables.shape[1]))
        step = self._steps.get(size)
        if step is None:
            own = _own_inputs(*size)
            _fill(own, inputs)
            step = self._steps[size] = _Step(own, *self._record(lambda: self.model.forward(own, kv, attend)))
        _fill(step.inputs, inputs)
        step.replay()
        self.num_replays += 1
        return step.logits[:num_seqs]


def filled_batch(num_seqs: int) -> int:
    """The size of the recording for so many sequences: a power of two, from 16 on a multiple of 16."""
    return next_power_of_two(num_seqs) if num_seqs <= 16 else -(-num_seqs // 16) * 16


def next_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _own_inputs(num_seqs: int, num_blocks: int) -> StepInputs:
    """Inputs of a batch in which no sequence has a key, and nothing is written."""

    def full(shape: int | tuple[int, int], value: int) -> Array:
        return xp.full(shape, value, dtype=np.int32)

    return StepInputs(
        token_ids=full(num_seqs, 0),
        positions=full(num_seqs, 0),
        slot_mapping=full(num_seqs, -1),
        seq_lens=full(num_seqs, 0),
        query_start_loc=xp.arange(num_seqs + 1, dtype=np.int32),
        logits_rows=xp.arange(num_seqs, dtype=np.int32),
        block_tables=full((num_seqs, num_blocks), 0),
    )


def _fill(own: StepInputs, inputs: StepInputs) -> None:
    """Copy a batch to the first rows; the rows after it stay, or become again, sequences of no keys."""
    num_seqs = inputs.seq_lens.shape[0]
    assert own.block_tables is not None and inputs.block_tables is not None  # noqa: PT018
    for name in ("token_ids", "positions", "slot_mapping", "seq_lens"):
        getattr(own, name)[:num_seqs] = getattr(inputs, name)
    own.block_tables[:num_seqs, : inputs.block_tables.shape[1]] = inputs.block_tables
    if num_seqs < own.seq_lens.shape[0]:
        own.slot_mapping[num_seqs:] = -1
        own.seq_lens[num_seqs:] = 0
