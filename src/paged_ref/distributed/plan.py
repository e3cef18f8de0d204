"""A step's plan in one buffer of 32-bit integers: all that rank 0 says to the others, which follow.

Requests, scheduler, manager, tables and sampler work on rank 0 only. Every other rank has its part of the weights, and
K and V of its own heads in a pool with the same block numbers. It keeps nothing from one step to the next beside K and
V, so rank 0 may undo a step, preempt or end a request without a word. The plan:

    5 counts: tokens, sequences, rows of logits, columns of the block tables (0: regions), transfers
    token_ids, positions, slot_mapping [tokens]  query_start_loc [sequences + 1]  seq_lens [sequences]
    logits_rows [rows]  block_tables [sequences, columns], or starts [sequences]  transfers [transfers, 4]

No K, no V and no activation is in the plan, and the plan does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import get_args, get_type_hints

import numpy as np

from ..core.attention.attention import Addresses
from ..core.engine.engine import Engine, Observer, to_device
from ..core.engine.scheduler import StepPlan
from ..core.memory.manager import Transfer
from ..core.model.llama import StepInputs
from .group import Group, GroupClosed

KINDS = get_args(get_type_hints(Transfer)["kind"])


def plan_bytes(num_tokens: int, num_seqs: int, num_rows: int, num_columns: int, num_transfers: int) -> int:
    """4 * (6 + 3 tokens + 2 sequences + rows + sequences * columns + 4 transfers); regions are one column."""
    return 4 * (6 + 3 * num_tokens + 2 * num_seqs + num_rows + num_seqs * max(1, num_columns) + 4 * num_transfers)


def pack(transfers: Sequence[Transfer], inputs: StepInputs) -> np.ndarray:
    """The buffer: int32, `plan_bytes` long. `inputs` lie in host memory."""
    where = inputs.addresses
    placed = where.starts if where.block_tables is None else where.block_tables
    columns = 0 if where.block_tables is None else where.block_tables.shape[1]
    counts = [len(inputs.token_ids), len(where.seq_lens), len(inputs.logits_rows), columns, len(transfers)]
    moves = [(KINDS.index(t.kind), t.source, t.destination, t.count) for t in transfers]
    arrays = [counts, inputs.token_ids, inputs.positions, where.slot_mapping, where.query_start_loc, where.seq_lens]
    arrays += [inputs.logits_rows, placed, moves]
    return np.concatenate([np.asarray(array, dtype=np.int32).ravel() for array in arrays])


def unpack(buffer: np.ndarray) -> tuple[list[Transfer], StepInputs]:
    """What `pack` was given."""
    tokens, seqs, rows, columns, transfers = (int(count) for count in buffer[:5])
    sizes = [5, tokens, tokens, tokens, seqs + 1, seqs, rows, seqs * max(1, columns), 4 * transfers]
    _, ids, positions, slots, loc, seq_lens, logits_rows, placed, moves = np.split(buffer, np.cumsum(sizes)[:-1])
    tables, starts = (placed.reshape(seqs, columns), None) if columns else (None, placed)
    found = [Transfer(KINDS[kind], *numbers) for kind, *numbers in moves.reshape(-1, 4).tolist()]
    return found, StepInputs(ids, positions, logits_rows, Addresses(seq_lens, loc, tables, starts, slots))


class Leader(Observer):
    """Of rank 0's engine: before each step, the plan goes to the others."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def before_step(self, plan: StepPlan, inputs: StepInputs) -> None:
        self.group.broadcast(pack(plan.transfers, inputs))


def follow(engine: Engine, group: Group) -> None:
    """Compute the steps of rank 0 with this rank's model and K and V, until rank 0 closes the group."""
    with suppress(GroupClosed):
        while True:
            transfers, inputs = unpack(group.take(0, np.int32))
            engine.kv.begin_step(StepPlan(transfers=transfers), inputs)
            engine.model.forward(to_device(inputs), engine.kv)
