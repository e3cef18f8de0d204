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
# With the standard manager, and with the package's paged one.


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


runs = {name: serve(name) for name in ("standard", "paged")}
rows = [(name, *run[1:]) for name, run in runs.items()]
columns = ("manager", "together", "steps", "gave way")
table("The sixteen requests", columns, rows)
two.grade(
    runs["standard"][2], within=0.2,
    why="all tokens over 2, and some steps in which one waits for another",
)  # fmt: skip
paged.grade(
    runs["paged"][2], within=0.2,
    why="all run together, so the longest output decides",
)  # fmt: skip

# Two at a time share the tokens of all outputs, and now and then a prompt
# waits for a step. The longest output bounds what paging can reach: its
# request gets one token in each step, from the first step to the end.

written = sum(len(tokens) for tokens in runs["paged"][0])
show(f"  {written} tokens were written; half of it is {written // 2}\n")
claim(
    "no step more than its longest output", runs["paged"][2], max(outputs)
)

# ## What must hold
#
# The manager decides where K and V lie, and how many sequences run. It may
# change no token.

same = runs["standard"][0] == runs["paged"][0]
claim("the tokens are the same", same)

# A table that is kept after its blocks are free is the classic mistake of a
# cache: the next sequence gets the blocks, and both write into them.


def frees_and_keeps(real):
    def free(self, seq_id):
        blocks = self.tables[seq_id].blocks
        real(self, seq_id)
        self.pool.release(blocks[0])

    return free


break_it(
    "a block is given back twice",
    where=(PagedManager, "free"), bug=frees_and_keeps,
    run=lambda: serve("paged", REQUESTS[1:4])[0], caught_by="engine",
)  # fmt: skip

# ## Exercise
#
# Write `MyCache` in `my_cache.py`. Its docstrings say what each method
# promises. The file is graded in stages, from one table that grows to
# random operations beside the real manager; the first operation that
# differs is named. Leave and come back as often as you wish.

MyCache = build("MyCache")

# Now it serves. `LLM(manager=...)` takes any cache of this kind.

mine = serve(MyCache(SLOTS // BLOCK_SIZE, BLOCK_SIZE))
rows.append(("MyCache", *mine[1:]))
table("The sixteen requests", columns, rows)
claim("the tokens are the same", mine[0] == runs["paged"][0])
claim("steps", mine[2], runs["paged"][2])

# And with too little memory for four of them: your refusals make the
# scheduler preempt, and no token may change.

few = serve(MyCache(8, BLOCK_SIZE), REQUESTS[3:7])
table("Four requests, eight blocks", columns, [("MyCache", *few[1:])])
claim("the tokens are the same", few[0] == runs["paged"][0][3:7])
claim("sequences gave way", few[3] > 0)

# ## In production systems
#
# vLLM's first block manager was this file, grown: the same tables, counts
# and copies, with a watermark and a host pool. Later engines keep blocks in
# a free list by last use, and find them again by their tokens (lesson 13).

# ## Next
#
# See it move: `paged-ref demo`, and `paged-ref viz`.
#
# Your own case: `paged-ref assess` for your model, GPU and traffic.
