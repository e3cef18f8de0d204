"""The walk through a kernel that a reader wrote: `paged-ref walk --mine FILE`, for the file of lessons 8 and 9."""

from __future__ import annotations

import inspect
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...tracer import trace
from ..common.own_code import error_in_words
from .call import Walk, walk
from .kernel_run import KernelRun
from .sizes import LETTERS, Sizes
from .source import SourceLines, fold, lines_of_kernel

NAME = "my_paged_attention"
PARAMETERS = ["out", "query", "keys", "values", "block_tables", "block_size", "seq_lens", "scale"]


class OwnRun(KernelRun):
    """A run of a kernel of which only the arguments are known: which thread takes which key is its own choice."""

    def slot_named(self, position: int) -> int | None:
        access = self.access(position)
        if access.array != "block_tables":
            return self.slot(position)
        return self.tables[access.index[0]][access.index[-1]] * self.sizes.block_size

    def sentence(self, position: int) -> str:
        """What the thread does at this access."""
        access, info = self.access(position), self.info(position)
        what = f"Thread {access.thread} {'writes' if access.write else 'reads'}"
        if access.array == "block_tables":
            seq, entry = access.index[0], access.index[-1]
            block, size = self.tables[seq][entry], self.sizes.block_size
            slots = f"slots {block * size} to {block * size + size - 1}"
            return f"{what} entry {entry} of {LETTERS[seq]}'s block table: block {block}, {slots}."
        if (slot := self.slot(position)) is not None:
            seq, held = self.owner.get(slot, (0, None))
            token = "no token lies there" if held is None else f"token {held} of {LETTERS[seq]}"
            place = f"block {slot // self.sizes.block_size}, offset {slot % self.sizes.block_size}"
            return f"{what} element {access.index[-1]} of {info.name} in slot {slot}: {token} ({place})."
        where = "shared memory, which all threads of the CUDA block see" if info.space == "shared" else "global memory"
        return f"{what} {info.name}[{', '.join(map(str, access.index))}] in {where}."


def own_walk(path: Path, sizes: Sizes) -> Walk:
    """Run the reader's kernel on the sequences of the walk. Raises ValueError for a file without such a kernel, and
    for a mistake that the tracer finds, with its line."""
    sizes.check()
    if sizes.num_threads != sizes.head_size:
        bound = f"with --mine as many as --head-size {sizes.head_size} are needed"
        raise ValueError(f"--threads is {sizes.num_threads}; {bound}")
    kernel = _kernel_in(path)
    real = walk(sizes).runs["paged"]
    rng, num_seqs = np.random.default_rng(sizes.seed), len(sizes.tokens)
    keys, values = np.full((2, real.num_slots, *real.shape[2:]), np.nan, dtype=sizes.dtype)
    held = [slot for slot, (_, position) in real.owner.items() if position is not None]
    keys[held], values[held] = rng.standard_normal((2, len(held), *real.shape[2:]))
    block_tables = np.full((num_seqs, max(map(len, real.tables))), -1, dtype=np.int32)
    for seq, table in enumerate(real.tables):
        block_tables[seq, : len(table)] = table
    query = rng.standard_normal((num_seqs, sizes.num_heads, sizes.head_size)).astype(sizes.dtype)
    lengths, scale = np.array(sizes.tokens, dtype=np.int32), np.float32(sizes.head_size**-0.5)
    args = (np.empty_like(query), query, keys, values, block_tables, sizes.block_size, lengths, scale)
    try:
        made = trace.run(kernel, query.shape[:2], sizes.num_threads, *args)
    except trace.KernelError as error:
        if type(error.__cause__).__name__ == "Pending":  # of a todo() of the lesson
            raise ValueError(f"--mine is {path}; its {NAME}, which is shown here, is still to be written") from None
        raise ValueError(f"--mine is {path}; line {error.line}, thread {error.thread.x}: {error.what}") from None
    known = {info.name for info in made.arrays}  # the counters have a row for each argument of the real kernel
    missing = [info for info in real.trace.arrays if info.space == "global" and info.name not in known]
    made = replace(made, arrays=(*made.arrays, *missing))
    code = SourceLines(path.name, tuple(fold(inspect.getsourcelines(made.function))), {})
    run = OwnRun("paged", sizes, made, code, real.owner, real.tables, real.shape, lines_of_kernel(made))
    return Walk(sizes, {"paged": run})


def _kernel_in(path: Path) -> Any:
    try:
        kernel = runpy.run_path(str(path), run_name=path.stem).get(NAME)
    except OSError as error:
        raise ValueError(f"--mine is {path}: {error.strerror}") from None
    except Exception as error:  # whatever the reader's file raises
        raise ValueError(f"--mine is {path}: {error_in_words(error, str(path))}") from None
    if kernel is None:
        raise ValueError(f"--mine is {path}; it defines no {NAME}")
    found = list(inspect.signature(getattr(kernel, "py_func", kernel)).parameters)
    if found != PARAMETERS:
        raise ValueError(f"--mine is {path}; {NAME} takes {', '.join(found)}, and {', '.join(PARAMETERS)} are needed")
    return kernel
