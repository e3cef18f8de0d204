"""Lesson 7: storage in pages, read by a dense gather

Question: what does it cost to collect the pages before attention?
Time: 15 minutes. Needs lessons 5 and 6.

The blocks are handed out, and K and V lie in them. Attention as you know it
wants one dense tensor of keys. So the simplest way is to collect the pages
into one tensor in each step, and to call the old attention. This way is
right and slow, and every paged kernel is tested against it.
"""

from dataclasses import replace

import numpy as np

from paged_ref import LLM, SamplingParams
from paged_ref.core.device import module_of
from paged_ref.kernels import naive_attention, slot_of, write_kv
from paged_ref.lesson import break_it, check, claim, plug_in
from paged_ref.lesson import predict, table, todo
from paged_ref.core.memory import kv

# ## Predict
#
# One sequence of 11 tokens in blocks of 4 slots. A kernel that reads K in
# place reads each element once for each head. The gather reads the element
# in its page and writes it to the dense tensor, where attention reads it.
# The gather copies whole blocks, also the empty slots of the last.

SEQ_LEN, BLOCK_SIZE, KV_HEADS, HEAD_SIZE = 11, 4, 2, 8
BLOCK_TABLE = [5, 0, 3]
ROW = KV_HEADS * HEAD_SIZE  # elements of one slot

moved = predict(
    "Elements of K that one gather reads and writes?", "elements"
)
times = predict(
    "How many times the traffic of reading K in place?", "times"
)

# ## Run
#
# The cache is `[num_blocks, block_size, num_kv_heads, head_size]`. A slot
# that was never written is NaN, so that a stray read shows. `write_kv` puts
# each token's key and value into its slot.

shape = (6, BLOCK_SIZE, KV_HEADS, HEAD_SIZE)
key_cache = np.full(shape, np.nan, dtype=np.float32)
value_cache = key_cache.copy()
draw = np.random.default_rng(0).standard_normal
key, value = draw((2, SEQ_LEN, KV_HEADS, HEAD_SIZE), dtype=np.float32)
positions = np.arange(SEQ_LEN)
slots = slot_of(np.array(BLOCK_TABLE), positions, BLOCK_SIZE)
write_kv(key, value, key_cache, value_cache, slots)

rows = []
for block in range(len(key_cache)):
    held = ~np.isnan(key_cache[block, :, 0, 0])
    where = BLOCK_TABLE.index(block) if block in BLOCK_TABLE else ""
    rows.append((block, where, "".join("#" if h else "." for h in held)))
table("The cache: # is a written slot", ("block", "logical", "slots"), rows)

# The gather: take the blocks of the table, join them, and cut off the slots
# behind the last token.

pages = key_cache[BLOCK_TABLE]
dense = pages.reshape(-1, KV_HEADS, HEAD_SIZE)[:SEQ_LEN]
claim("keys out of place after the gather", int((dense != key).sum()), 0)
traffic = 2 * pages.size
moved.grade(traffic)
times.grade((traffic + dense.size) / dense.size, within=0.1)

# Decoding waits for memory, so three times the traffic takes close to three
# times as long. And the copies need the room that paging was to save.

# ## What must hold
#
# No slot behind the last token may be read. A mask is not enough: zero
# times NaN is NaN, and the sequence that had the block before may have left
# anything there.

tail = pages.reshape(-1, KV_HEADS, HEAD_SIZE)[SEQ_LEN:]
claim("slots behind the last token", len(tail), -SEQ_LEN % BLOCK_SIZE)
claim("zero times what lies there is NaN", bool(np.isnan(0 * tail).all()))

# Here is an engine that rounds the length up to whole blocks.


def generate():
    options = {"backend": "reference", "sanitize": True}
    llm = LLM(block_size=4, kv_cache_tokens=64, **options)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    (request,) = llm.generate("Four score and seven years ago our", params)
    return request.outputs[0].token_ids


def whole_blocks(real):
    def attend(call, backend):
        up = -(-call.addresses.seq_lens // 4) * 4
        at = replace(call.addresses, seq_lens=up)
        return real(replace(call, addresses=at), backend)

    return attend


break_it(
    "attention reads to the end of the last block",
    where=(kv, "attend"), bug=whole_blocks, run=generate,
    caught_by="sanitizer",
)  # fmt: skip

# ## Exercise
#
# Write the gather, for K or V. It is the same in any array library.


def my_gather(cache, block_table, seq_len):
    """cache [num_blocks, block_size, ...] -> [seq_len, ...]"""
    return todo("2 lines")


def spec(cache, block_table, seq_len):
    positions = module_of(cache).arange(seq_len)
    slots = slot_of(block_table, positions, cache.shape[1])
    return cache.reshape(-1, *cache.shape[2:])[slots]


cache, order = draw((6, 4, 2, 8)), np.array([5, 0, 3])
cases = [(cache, order, n) for n in (12, 11, 9, 1)]
hint = "Index by the table, reshape so that slots come first, cut."
mine = check(my_gather, spec=spec, cases=cases, hint=hint)

# With your gather the old attention serves the paged cache (here, of one
# sequence).


def gathered(call, backend):
    at, caches = call.addresses, (call.keys, call.values)
    table, seq_len = at.block_tables[0], int(at.seq_lens[0])
    dense = [mine(cache, table, seq_len) for cache in caches]
    sizes = 0 * at.seq_lens, at.seq_lens, at.query_start_loc
    call.out[:] = naive_attention(
        call.query, *dense, *sizes, scale=call.scale, backend="reference"
    )


usual = generate()
with plug_in((kv, "attend"), gathered):
    claim("the model gives the same tokens", generate(), usual)

# ## In production systems
#
# A framework without a paged kernel gathers. All others read in place.

# ## Next
#
# Lesson 8: inside a kernel, thread by thread, on memory in one piece.
