"""Lesson 15: longer than the device

Question: how can a context be larger than the memory that holds it?
Time: 20 minutes. Needs lessons 10 and 14.

Swapping moved whole sequences that had to wait. What if a single running
sequence does not fit? Then its pages must be loaded and evicted while a
step is computed. There are two ways: read all pages, some at a time, or
only the pages that matter.
"""

import numpy as np

from paged_ref import LLM, SamplingParams
from paged_ref.core.device import to_host, xp
from paged_ref.beyond_device.kv import Counters, StreamedKV
from paged_ref.lesson import break_it, check, claim
from paged_ref.lesson import predict, show, table, todo
from paged_ref.beyond_device.relevance import Extremes

# ## Predict
#
# A story in blocks of four tokens; the device holds eight blocks. A quarter
# of these is for **staging**: pages from the host are loaded there, read,
# and overwritten by the next ones. All keys are read for each new token.

STORY = """Lily had a red ball and a small dog. The dog was called Tom. One
day Lily and Tom went to the park to play. In the park there was a big tree.
The ball flew up into the tree. Lily was sad, and Tom wanted to help. A boy
came and saw that she was sad. He took the ball out of the tree. Lily"""
NEW = 8
tokens = LLM("tiny", backend="reference").tokenizer.encode(STORY)
show(f"  The story has {len(tokens)} tokens.")
moved = predict("How much of K and V moves for each token?", "percent")

# ## Run


def run(**options):
    llm = LLM("tiny", block_size=4, backend="reference", **options)
    seen = []
    params = SamplingParams(NEW, ignore_eos=True)
    output = llm.output_of(llm.add_request(STORY, params))
    llm.step()  # the prompt
    if isinstance(llm.engine.kv, StreamedKV):
        llm.engine.kv.counters = Counters()
        llm.engine.kv.observe = seen.append
    while llm.has_unfinished:
        llm.step()
    return output.outputs[0].token_ids, llm, seen


usual, _, _ = run()
exact, llm, _ = run(device_blocks=8, host_blocks=60, sanitize=True)
read = llm.engine.kv.counters
show(f"  pages read: {read.attended}, of these resident: {read.resident}\n")
moved.grade(
    100 * (1 - read.hit_rate), within=0.15,
    why="the story has some 23 blocks, and 6 of the 8 stay: 17 / 23",
)  # fmt: skip
claim("the tokens are those of an ample device", exact == usual)
away = (read.attended - read.resident) * llm.engine.kv.page_bytes
claim("all other pages were loaded", read.bytes_in >= away)

# Each group of pages gives attention over its own keys, and the states are
# joined as in lesson 10: exact, and slow. So, which pages matter? The
# scores are known only after the keys are read. But scores have a
# **bound**. Of the keys of a block, the largest and the smallest value of
# each channel (element of a key) are kept. In each channel, no key adds
# more to the score than the larger of the query's products with the two.

limited, llm, seen = run(device_blocks=8, host_blocks=60, attend=0.25)
first = llm.engine.kv.full_layers  # these read everything, always
seen = [choice for choice in seen if choice.layer >= first]
found = []
for choice in seen:
    masses = choice.mass.mean(axis=1)  # [kv_heads, blocks]
    for mass, chosen in zip(masses, choice.chosen, strict=True):
        count = len(chosen)
        best, recent = np.sort(mass)[-count:], mass[-count:]
        by_lot = count / len(mass)
        found.append((mass[chosen].sum(), best.sum(), recent.sum(), by_lot))

bounds, best, recent, by_lot = np.mean(found, axis=0)
rows = [("by bounds", f"{bounds:.0%}"), ("the best", f"{best:.0%}")]
rows += [("the last", f"{recent:.0%}"), ("at random", f"{by_lot:.0%}")]
table("Attention in a quarter of the blocks", ("chosen", "share"), rows)
claim("the bounds beat chance, not the truth", by_lot < bounds < best)

# One head of the last token: how much attention each block has, and which
# blocks the bounds chose. The first and the last block are always chosen.

mass, chosen = seen[-1].mass[0].mean(axis=0), seen[-1].chosen[0]
bars = ["▁▂▃▄▅▆▇█"[min(7, int(40 * share))] for share in mass]
marks = ["↑" if block in chosen else " " for block in range(len(mass))]
show(f"  {''.join(bars)}\n  {''.join(marks)}\n")
less = llm.engine.kv.counters
rows = [("all", read.bytes_in // read.tokens, exact == usual)]
rows += [("a quarter", less.bytes_in // less.tokens, limited == usual)]
table("For each token", ("blocks read", "bytes moved", "same text"), rows)
claim("fewer bytes move", less.bytes_in < read.bytes_in)

# ## What must hold
#
# A bound must never be below a true score, or a block that matters is left
# out. Where the query is negative, the smallest value scores highest.

rng = np.random.default_rng(0)


def too_low():
    keys = rng.standard_normal((4, 1, 16), dtype=np.float32)
    query = rng.standard_normal((1, 9, 16), dtype=np.float32)
    block = Extremes(num_kv_heads=1, head_size=16, block_size=4)
    block.write(0, xp.asarray(keys))
    bounds = to_host(block.bounds(xp.asarray(query)))
    true = (query[0] @ keys[:, 0].T).max(axis=1)
    return [f"{(bounds[0, :, 0] < true).sum()} of 9 bounds are too low"]


break_it(
    "in each channel the worse of the two values is taken",
    where=(Extremes, "bounds"),
    bug=lambda real: lambda self, query: -real(self, -query),
    run=too_low, caught_by="contract",
)  # fmt: skip

# ## Exercise
#
# Give the bound of one query [head_size] for one block of keys, of shape
# [tokens, head_size].


def my_bound(query, keys):
    return todo("2 lines")


def spec(query, keys):
    block = Extremes(1, keys.shape[1], len(keys))
    block.write(0, xp.asarray(keys[:, None]))
    return float(block.bounds(xp.asarray(query[None, None]))[0, 0, 0])


draw = rng.standard_normal
cases = [(draw(8, "f"), draw((4, 8), "f")) for _ in range(4)]
hint = (
    "In each dimension, what is the most that query * key can be?\n"
    "np.maximum of query * largest and query * smallest; then the sum."
)
check(my_bound, spec=spec, cases=cases, hint=hint)

# ## In production systems
#
# The bounds are those of Quest (Tang et al. 2024): attention up to 7.03
# times as fast. No large server chooses pages by default, as this changes
# answers, and it is not what servers call PagedAttention. `paged-ref long`
# measures both ways.

# ## Next
#
# See it move: `paged-ref long --record long.jsonl`, then `paged-ref viz
# long.jsonl`.
#
# Lesson 16: pages for other data than K and V: training.
