"""To and from the block tables of other systems.

vLLM and flash-attn take `block_tables [num_seqs, max_blocks]` as they are. FlashInfer takes the same table in
CSR form, without padding. SGLang keeps the slot of every single token. Arrays are NumPy or CuPy.

Sources: FlashInfer's documentation, "KV-Cache Layout in FlashInfer"; SGLang `srt/mem_cache/memory_pool.py`.
"""

from __future__ import annotations

import numpy as np

from ..core.attention.addressing import slot_of
from ..core.checks import require
from ..core.device import Array, module_of
from .array_checks import require_shape


def to_flashinfer_tables(block_tables: Array, seq_lens: Array, block_size: int) -> tuple[Array, Array, Array]:
    """The block tables in CSR form, int32, as FlashInfer's `plan` takes them: copies.

    kv_indptr         [num_seqs + 1]  where each sequence's pages begin in kv_indices; the last is their number
    kv_indices        [kv_indptr[-1]] the pages, one sequence after the other, without padding
    kv_last_page_len  [num_seqs]      tokens in the last page, 1 to block_size

    A sequence without tokens gets no page and a last page of 0 tokens; FlashInfer's documentation asks for 1
    at least, so leave such a sequence out of a call.
    """
    tables, lens = _check_tables("block_tables", block_tables, seq_lens, block_size, block_size=block_size)
    module = module_of(tables)
    pages = -(-lens // block_size)
    indptr = module.zeros(len(lens) + 1, dtype=np.int64)
    indptr[1:] = module.cumsum(pages)
    used = module.arange(tables.shape[1]) < pages[:, None]  # [num_seqs, max_blocks]
    last = lens - module.maximum(pages - 1, 0) * block_size
    return _as_int32("kv_indptr", indptr), _as_int32("kv_indices", tables[used]), last.astype(np.int32)


def from_flashinfer_tables(
    kv_indptr: Array, kv_indices: Array, kv_last_page_len: Array, block_size: int
) -> tuple[Array, Array]:
    """(block_tables [num_seqs, max_blocks], seq_lens [num_seqs]), int32, padded with -1: copies."""
    require(block_size=(block_size, 1))
    for array, name in ((kv_indptr, "kv_indptr"), (kv_indices, "kv_indices"), (kv_last_page_len, "kv_last_page_len")):
        require_shape(array.ndim == 1, name, array, "one axis")
    if len(kv_indptr) != len(kv_last_page_len) + 1:
        raise ValueError(f"kv_indptr has {len(kv_indptr)} entries; {len(kv_last_page_len) + 1} are needed, one more "
                         "than kv_last_page_len")  # fmt: skip
    module = module_of(kv_indices)
    pages = kv_indptr[1:] - kv_indptr[:-1]
    if int(kv_indptr[0]) != 0 or int(kv_indptr[-1]) != len(kv_indices) or bool((pages < 0).any()):
        raise ValueError(f"kv_indptr must rise from 0 to the {len(kv_indices)} entries of kv_indices")
    bad = (kv_last_page_len > block_size) | (kv_last_page_len < (pages > 0)) | ((pages == 0) & (kv_last_page_len != 0))
    if bool(bad.any()):
        s = int(bad.argmax())
        bound = f"1 to {block_size}" if int(pages[s]) else "0, as it has no page,"
        raise ValueError(f"kv_last_page_len[{s}] is {int(kv_last_page_len[s])}; {bound} is needed")
    tables = module.full((len(pages), int(pages.max()) if len(pages) else 0), -1, dtype=np.int32)
    tables[module.arange(tables.shape[1]) < pages[:, None]] = kv_indices
    lens = module.maximum(pages - 1, 0) * block_size + kv_last_page_len
    return tables, lens.astype(np.int32)


def to_sglang_tables(block_tables: Array, seq_lens: Array, block_size: int) -> Array:
    """`req_to_token [num_seqs, max_context_len]`, int32: the slot of each token; 0 past the end. A copy.

    One row for each sequence, as SGLang's ReqToTokenPool keeps them; max_context_len is what the tables hold. Raises
    ValueError for a slot that int32 does not hold.
    """
    tables, lens = _check_tables("block_tables", block_tables, seq_lens, block_size, block_size=block_size)
    module = module_of(tables)
    positions = module.arange(tables.shape[1] * block_size)
    slots = module.zeros((len(lens), len(positions)), dtype=np.int64)
    for s, length in enumerate(lens.tolist()):
        slots[s, :length] = slot_of(tables[s].astype(np.int64), positions[:length], block_size)
    return _as_int32("req_to_token", slots)


def from_sglang_tables(req_to_token: Array, seq_lens: Array, page_size: int = 1) -> Array:
    """block_tables [num_seqs, max_blocks], int32, padded with -1: a copy.

    With pages of one token this is req_to_token itself. Raises ValueError where the tokens of a page do not
    lie next to one another in order.
    """
    slots, lens = _check_tables("req_to_token", req_to_token, seq_lens, 1, page_size=page_size)
    module = module_of(slots)
    tables = module.full((len(lens), -(-slots.shape[1] // page_size)), -1, dtype=np.int32)
    for s, length in enumerate(lens.tolist()):
        pages = slots[s, :length:page_size] // page_size
        positions = module.arange(length)
        wrong = slots[s, :length] != slot_of(pages, positions, page_size)
        if bool(wrong.any()):
            p = int(wrong.argmax())
            raise ValueError(
                f"req_to_token[{s}, {p}] is {int(slots[s, p])}; {int(slot_of(pages, p, page_size))} is needed, "
                f"as pages hold {page_size} tokens in order"
            )
        tables[s, : len(pages)] = pages
    return tables


def _as_int32(name: str, numbers: Array) -> Array:
    """`numbers` as the other library takes them. Raises ValueError for one that int32 does not hold."""
    if numbers.size and int(numbers.max()) > np.iinfo(np.int32).max:
        raise ValueError(f"{name} holds {int(numbers.max())}; {np.iinfo(np.int32).max} is the most that int32 holds")
    return numbers.astype(np.int32)


def _check_tables(name: str, tables: Array, seq_lens: Array, unit: int, **size: int) -> tuple[Array, Array]:
    """`tables`, and `seq_lens` as int64. `unit`: tokens of an entry of `tables`; `size`: of a block, by its name."""
    require(**{size_name: (value, 1) for size_name, value in size.items()})
    require_shape(tables.ndim == 2, name, tables, "[num_seqs, ...]")
    if tuple(seq_lens.shape) != tables.shape[:1]:
        raise ValueError(f"seq_lens has shape {list(seq_lens.shape)}; [{tables.shape[0]}] is needed, as {name} has")
    if seq_lens.size and int(seq_lens.min()) < 0:
        s = int(seq_lens.argmin())
        raise ValueError(f"seq_lens[{s}] is {int(seq_lens[s])}; at least 0 is needed")
    if seq_lens.size and int(seq_lens.max()) > (room := tables.shape[1] * unit):
        s = int(seq_lens.argmax())
        raise ValueError(f"seq_lens[{s}] is {int(seq_lens[s])}; its row of {name} holds {room} tokens")
    return tables, seq_lens.astype(np.int64)
