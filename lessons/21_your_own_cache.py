"""Lesson 21: your own paged cache

Question: can a cache that you wrote serve the model, and as fast?
Time: 90 minutes. Needs lessons 5, 6, 12 and 14.

You have seen the parts: the table, the pool with its counts, copy on write,
and the refusal that lets a scheduler preempt. Here you put them together.
What you write takes the place of the package's own in the real engine, and
serves the sixteen requests of `paged-ref demo`.
"""

from paged_ref import LLM, SamplingParams
from paged_ref.commands.demo import REQUESTS
from paged_ref.core.memory.paged import PagedManager
from paged_ref.lesson import break_it, build, claim
from paged_ref.lesson import predict, show, table

# ## Predict
#
# The demo's requests, on a cache of 1,024 tokens. The standard manager
# reserves 512 for each, so two run together. A step gives each sequence
# that runs one more token.

SLOTS, LONGEST, BLOCK_SIZE = 1024, 512, 16
outputs = [new for _, new in REQUESTS]
show(f"  outputs: {sum(outputs)} tokens; the longest {max(outputs)}\n")

two = predict("Steps, if two run at the same time?", "steps")
paged = predict("Steps, if blocks are taken as they are needed?", "steps")

# ## Run
#
# First with the standard manager. Your own cache, below, shows what paging
# changes.


def serve(manager, requests=REQUESTS, slots=SLOTS):
    """Tokens of all requests; most together, steps, preemptions."""
    records = []
    llm = LLM(
        manager=manager, kv_cache_tokens=slots, max_model_len=LONGEST,
        backend="reference", on_step=records.append,
    )  # fmt: skip
    params = [SamplingParams(max_tokens=new) for _, new in requests]
    outputs = llm.generate([prompt for prompt, _ in requests], params)
    tokens = [output.outputs[0].token_ids for output in outputs]
    preempted = sum(output.num_preemptions for output in outputs)
    together = max(record.num_running for record in records)
    return tokens, together, len(records), preempted


standard = serve("standard")
rows = [("standard", *standard[1:])]
columns = ("manager", "together", "steps", "gave way")
table("The sixteen requests", columns, rows)
written = sum(len(tokens) for tokens in standard[0])
two.grade(
    standard[2], within=0.2,
    why=f"{written} tokens over 2, and steps in which a place is empty",
)  # fmt: skip

# ## What must hold
#
# The manager decides where K and V lie, and how many sequences run. It may
# change no token: what was written here is what your cache must write.

# A block that is given back twice is the classic mistake of a cache: two
# sequences get the block, and both write into it.


def frees_and_keeps(real):
    def free(self, seq_id):
        blocks = self.tables[seq_id].blocks
        real(self, seq_id)
        self.pool.release(blocks[0])

    return free


break_it(
    "a block is given back twice",
    where=(PagedManager, "free"), bug=frees_and_keeps,
    run=lambda: serve("paged", REQUESTS[3:4])[0], caught_by="engine",
)  # fmt: skip

# ## Exercise
#
# Write `MyCache` in `my_cache.py`. Its docstrings say what each method
# promises. The file is graded in stages, from one table that grows to
# random operations beside the real manager; the first operation that
# differs is named. Leave and come back as often as you wish.

MyCache = build("MyCache")

# Now it serves. `LLM(manager=...)` takes any cache of this kind. The
# longest output bounds what paging can reach: its request gets one token in
# each step, from the first step to the end.

mine = serve(MyCache(SLOTS // BLOCK_SIZE, BLOCK_SIZE))
table("The sixteen requests", columns, [*rows, ("paged", *mine[1:])])
paged.grade(
    mine[2], within=0.2,
    why="all run together, so the longest output decides",
)  # fmt: skip
claim("the tokens are the same", mine[0] == standard[0])
claim("steps, as many as the longest output has tokens", mine[2], 120)

# And with too little memory for four of them: your refusals make the
# scheduler preempt, and no token may change.

few = serve(MyCache(8, BLOCK_SIZE), REQUESTS[3:7])
table("Four requests, eight blocks", columns, [("paged", *few[1:])])
claim("the tokens are the same", few[0] == standard[0][3:7])
claim("sequences gave way", few[3] > 0)

# ## In production systems
#
# vLLM's first block manager had the same tables, counts and copies, with a
# watermark and a host pool beside them. Later engines keep free blocks by
# last use, and find them again by their tokens (lesson 13).

# ## Next
#
# See it move: `paged-ref demo`, and `paged-ref viz`.
#
# Your own case: `paged-ref assess` for your model, GPU and traffic.
