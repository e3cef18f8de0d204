"""Lesson 12: fork and copy on write

Question: how do several continuations of one prompt share its memory?
Time: 20 minutes. Needs lesson 11.

Three answers to one prompt, or the beams of a search: such sequences begin
with the same tokens, so with the same K and V. Block tables make sharing
cheap: two tables may name the same block. A fork copies a table, and no
byte of K and V. The trouble begins when one of the sequences must write.
"""

from paged_ref import LLM, SamplingParams
from paged_ref.lesson import break_it, check, claim
from paged_ref.lesson import predict, show, table, todo
from paged_ref.timeline.events import TokensAppended
from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.core.memory.paged import PagedManager, Table

# ## Predict
#
# A prompt of ten tokens, blocks of four slots, three samples. After the
# prompt, each sample writes one token of its own. Each block has a count of
# the tables that name it. A sequence that must write into a block of
# several tables copies the block first (**copy on write**).

PROMPT = list(range(20, 30))
N, BLOCK_SIZE = 3, 4
held = predict("How many blocks do the three samples hold then?", "blocks")
copied = predict("How many blocks were copied?", "blocks")

# ## Run
#
# Two steps. The first computes the prompt, forks its sequence and draws a
# token for each sample. In the second each sample writes K and V of its own
# token.


def engine(**options):
    options |= {"block_size": BLOCK_SIZE, "kv_cache_tokens": 160}
    return LLM("tiny", backend="reference", sanitize=True, **options)


def sampled(n, seed):
    options = {"temperature": 1.5, "ignore_eos": True}
    return SamplingParams(10, n=n, seed=seed, **options)


# Beside each block stands the number of tables that name it.

events = []
llm = engine(log=events.append)
llm.add_request(PROMPT, sampled(N, 7))
llm.step()
llm.step()
manager = llm.engine.manager.manager  # inside the one that logs
count = manager.pool.ref_count
rows = []
for seq in range(N):
    blocks = manager.placement(seq)
    names = "  ".join(f"{block} ({count[block]})" for block in blocks)
    rows.append((seq, manager.length(seq), names))
table("The tables: block (tables)", ("sample", "tokens", "blocks"), rows)

copies = [e.copied for e in events if isinstance(e, TokensAppended)]
copies = [pair for pair in copies if pair]
held.grade(
    manager.pool.num_blocks - manager.pool.num_free,
    why="2 full blocks for all, and for each sample one to write in: 2 + 3",
)
copied.grade(
    len(copies), why="two copy; by then only the third names the old block"
)
claim("full blocks of the prompt, in all tables", count.count(N), 2)
claim("copies: the last sample writes in place", len(copies), N - 1)
claim("slots that sharing saves", manager.snapshot().shared, 4 * 4)

# Sharing must change no token. Sample i of a request with seed s draws the
# tokens of a request with seed s + i, so three requests are the oracle:


def tokens(*params):
    outputs = engine().generate([PROMPT] * len(params), params)
    return [t for o in outputs for one in o.outputs for t in one.token_ids]


alone = tokens(*(sampled(1, 7 + i) for i in range(N)))
claim(
    "the samples are three requests' answers", tokens(sampled(N, 7)), alone
)

# **Beam search** forks and frees at every step: a beam with two successors
# is forked, a beam with none is freed, and only counts change. So the
# shared blocks differ from step to step, without any plan.

llm = engine()
manager = llm.engine.manager
llm.add_request(PROMPT, SamplingParams(14, beam_width=4, ignore_eos=True))
saved, line = [], ""
while llm.has_unfinished:
    llm.step()
    now = manager.snapshot()
    used = manager.num_slots - now.free
    if used:
        saved.append(now.shared / (used + now.shared))
        line += f" {saved[-1]:4.0%}"
show(f"  blocks saved by sharing among 4 beams, step by step:\n  {line}\n")
claim("more than half is saved at the best step", max(saved) > 0.5)
claim("at the end every block is free again", manager.pool.num_free, 40)

# ## What must hold
#
# No sequence writes into a block that another table names, too. Here every
# count seems to be one, and the samples write over each other's tokens:


def in_place(real):
    def append(self, appends):
        count = self.pool.ref_count
        shared = {block: n for block, n in enumerate(count) if n > 1}
        count[:] = [min(n, 1) for n in count]
        copies = real(self, appends)
        for block, n in shared.items():
            count[block] = n
        return copies

    return append


break_it(
    "a shared block is written in place",
    where=(PagedManager, "append"), bug=in_place,
    run=lambda: tokens(sampled(N, 7)), caught_by="sanitizer",
)  # fmt: skip

# ## Exercise
#
# A sequence writes its next token, and its last block has room. If other
# tables name that block, take a new one from the end of `free`, put it into
# the table, and correct both counts. Return the copies as (old, new) pairs.


def my_append(blocks, ref_count, free):
    copies = []
    if ref_count[blocks[-1]] > 1:
        todo("4 lines")
    return copies


def spec(blocks, ref_count, free):
    order = [b for b, count in enumerate(ref_count) if count] + free[::-1]
    manager = PagedManager(BlockPool(len(order), order), BLOCK_SIZE)
    while manager.pool.num_free > len(free):
        manager.pool.allocate()
    manager.pool.ref_count = ref_count
    manager.tables[0] = Table(blocks, len(blocks) * BLOCK_SIZE - 1)
    copies = manager.append([(0, 1)])
    free[:] = manager.pool.free_blocks[::-1]
    return [(copy.source, copy.destination) for copy in copies]


cases = [([0, 2], [3, 0, 3, 0], [3, 1]), ([0, 3], [3, 0, 2, 1], [1])]
cases += [([1], [0, 2, 0], [2, 0])]
hint = (
    "Afterwards, which tables name the old block, and which the new?\n"
    "One table less names the old block; one table names the new block."
)
check(my_append, spec=spec, cases=cases, hint=hint)

# ## In production systems
#
# vLLM's first engine worked like this, and saved up to 66.3% of the memory
# in beam search (Kwon et al. 2023, §6.3). In its present engine samples
# share whole blocks only, through the prefix cache, and no block is copied.
# An engine that forks at any token still needs the copy.

# ## Next
#
# See it move: `paged-ref viz --at C --frame 2`.
#
# Lesson 13: sharing between requests that come one after another.
