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
from paged_ref.core.device import xp
from paged_ref.kernels import naive_attention, slot_of, write_kv
from paged_ref.lesson import break_it, check, claim, plug_in
from paged_ref.lesson import predict, table, todo
from paged_ref.core.memory import kv

# ## Predict
#
# One sequence of 11 tokens in blocks of 4 slots. A kernel that reads K in
# place reads each element once. The gather reads the element in its page
# and writes it to the dense tensor, where attention then reads it once. The
# gather copies whole blocks before it cuts, so it also copies the empty
# slots of the last block.

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
moved.grade(
    traffic, why="3 blocks x 4 slots x 16 elements = 192, read and written"
)
times.grade(
    (traffic + dense.size) / dense.size, within=0.1,
    why=f"({traffic} + {dense.size}) / {dense.size}: attention reads, too",
)  # fmt: skip

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
    prompts = ["Four score and seven years ago our", "The cat"]
    return [o.outputs[0].token_ids for o in llm.generate(prompts, params)]


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
# A batch needs one tensor of keys for all its sequences. Write its gather,
# for K or V: as long as the longest sequence, and zeros behind the last
# token of the others. (Behind its last block, a row of `block_tables` is
# filled up with -1.) `xp` has the names of NumPy.


def my_gather(cache, block_tables, seq_lens):
    """cache [num_blocks, block_size, ...], block_tables [num_seqs, blocks]
    -> [num_seqs, longest, ...], in the dtype of the cache"""
    return todo("6 lines")


def spec(cache, block_tables, seq_lens):
    rows, size = cache.reshape(-1, *cache.shape[2:]), cache.shape[1]
    shape = len(seq_lens), int(max(seq_lens)), *cache.shape[2:]
    dense = xp.zeros(shape, cache.dtype)
    for seq, seq_len in enumerate(seq_lens):
        for i in range(int(seq_len)):
            dense[seq, i] = rows[slot_of(block_tables[seq], i, size)]
    return dense


cache = xp.asarray(draw((6, 4, 2, 2), dtype=np.float32))
tables = xp.asarray([[5, 0, 3], [2, 4, -1]])
cases = [(cache, tables[:1], [12]), (cache, tables, [9, 8])]
cases += [(cache, tables, [11, 5])]
hint = (
    "Begin with zeros, and fill in one sequence after another.\n"
    "cache[block_tables[seq]] has its blocks: make it one row of slots, "
    "and cut the row to the length."
)
mine = check(my_gather, spec=spec, cases=cases, hint=hint)

# With your gather the old attention serves the paged cache.


def gathered(call, backend):
    at, caches = call.addresses, (call.keys, call.values)
    lens = at.seq_lens.tolist()
    dense = [mine(cache, at.block_tables, lens) for cache in caches]
    num_seqs, longest = dense[0].shape[:2]
    rows = [each.reshape(-1, *each.shape[2:]) for each in dense]
    sizes = longest * xp.arange(num_seqs), at.seq_lens, at.query_start_loc
    call.out[:] = naive_attention(
        call.query, *rows, *sizes, scale=call.scale, backend="reference"
    )


usual = generate()
with plug_in((kv, "attend"), gathered):
    claim("the model gives the same tokens", generate() == usual)

# ## In production systems
#
# A framework without a paged kernel gathers. All others read in place.

# ## Next
#
# See what a kernel reads instead: `paged-ref walk --view layouts`.
#
# Lesson 8: inside a kernel, thread by thread, on memory in one piece.
