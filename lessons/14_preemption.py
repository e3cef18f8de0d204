"""Lesson 14: preemption

Question: which sequence gives way when no block is free and all grow?
Time: 20 minutes. Needs lesson 13.

Paging admits sequences by what they need today. So many run together, and
that is a risk: if all sequences grow, the pool runs out of blocks in the
middle of their work. Then a sequence must give way, and lose only time.
"""

from paged_ref import LLM, SamplingParams
from paged_ref.core.model.config import kv_bytes_per_token
from paged_ref.core.engine.scheduler import Scheduler
from paged_ref.core.engine.sequence import Group, Sequence
from paged_ref.lesson import break_it, check, claim
from paged_ref.lesson import predict, show, table, todo
from paged_ref.timeline.events import StepPlanned
from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.kv import KVCache

# ## Predict
#
# The sequence that came last gives way. So the first always goes on, and in
# the end all are done. The blocks of a sequence can be **swapped** to host
# memory and back. Or the blocks are freed, and later the sequence's tokens
# are **recomputed** as one long prompt. Three prompts of eight tokens grow
# by sixteen; ten blocks of four slots.

PROMPTS = [[5 + i] * 8 for i in range(3)]
NEW, BLOCK_SIZE, BLOCKS = 16, 4, 10
need = predict("Blocks for all three at their longest?", "blocks")
victims = predict("How often does one of the three give way?", "times")

# ## Run


def run(blocks, preemption):
    records, events, options = [], [], {"preemption": preemption}
    options |= {"block_size": BLOCK_SIZE, "watermark": 0.0}  # use all
    options |= {"kv_cache_tokens": blocks * BLOCK_SIZE, "sanitize": True}
    options |= {"on_step": records.append, "log": events.append}
    llm = LLM("tiny", backend="reference", **options)
    params = SamplingParams(NEW, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params)
    tokens = [t for out in outputs for t in out.outputs[0].token_ids]
    plans = [e for e in events if isinstance(e, StepPlanned)]
    return tokens, plans, records


# P is a prompt, d one more token, ! a step in which the sequence gives way:


def picture(plans):
    text = ""
    for seq in range(len(PROMPTS)):
        text += f"  {seq} "
        for plan in plans:
            count = dict(plan.chunks).get(seq, 0)
            mark = "P" if count > 1 else "d" if count else "·"
            text += "!" if seq in plan.preempted else mark
        text += "\n"
    show(text)


# The same requests with ample memory and with too little:

WAYS = {"ample": (99, "swap")}
WAYS |= {way: (BLOCKS, way) for way in ("swap", "recompute")}
rows, tokens = [], None
for way, memory in WAYS.items():
    same, plans, records = run(*memory)
    if tokens:
        claim(f"{way}: no token changes", same, tokens)
    tokens = same
    computed = sum(count for plan in plans for _, count in plan.chunks)
    gave_way = sum(len(plan.preempted) for plan in plans)
    kinds = [t.kind for record in records for t in record.transfers]
    rows.append((way, len(plans), gave_way, computed, len(kinds)))
    picture(plans)

columns = ("way", "steps", "gave way", "tokens computed", "blocks moved")
table("What it costs", columns, rows)
need.grade(
    3 * -(-(8 + NEW - 1) // BLOCK_SIZE),
    why="8 + 16 - 1 tokens are written, in 6 blocks; three times 6",
)
victims.grade(
    rows[1][2],
    why="first 2, which came last; later 1, as 0 grows to 6 blocks",
)
ample, swap, recompute = rows
claim("swap computes each token once", swap[3], ample[3])
claim("recompute moves nothing", recompute[4], 0)
claim("and computes some tokens twice", recompute[3] > ample[3])

# Which is better depends on the machine. A token that comes back costs:

llm = LLM("tiny")
moved = 2 * kv_bytes_per_token(llm.config, "float32")
layer = llm.engine.model.layers[0]
weights = layer.qkv, layer.output, layer.gate_up, layer.down
operations = 2 * len(llm.engine.model.layers) * sum(w.size for w in weights)
show(f"  {moved:,} bytes there and back, or {operations:,} operations\n")

# ## What must hold
#
# A block must be saved before another sequence writes into it, and be back
# before its own sequence reads it. Here a block comes back in the table,
# but not in memory:


def never_back(real):
    def apply(self, transfers):
        real(self, [t for t in transfers if t.kind != "swap_in"])

    return apply


break_it(
    "blocks that come back from the host are mapped, and not copied",
    where=(KVCache, "apply"), bug=never_back,
    run=lambda: run(BLOCKS, "swap")[0], caught_by="sanitizer",
)  # fmt: skip

# ## Exercise
#
# Sequence 0 needs more blocks than are free. `blocks` has the number that
# each sequence holds, by arrival. Which sequences give way, one after
# another, until there is room?


def my_victims(blocks, free, needed):
    return todo("5 lines")


def spec(blocks, free, needed):
    pool = BlockPool(sum(blocks) + free)
    real = Scheduler(PagedManager(pool, 1), 999, 99)
    for seq, count in enumerate(blocks):
        real.add(Group([Sequence(seq, [0] * count, count, count + 1)]))
    for seq, _ in real.schedule().chunks:
        seq.num_computed = len(seq.tokens)
    real.running[0].leader.tokens += [0] * needed
    return [group.leader.seq_id for group in real.schedule().preempted]


cases = [([4, 3, 2], 1, 2), ([4, 3, 2, 1], 0, 5), ([2, 9, 1, 1], 1, 3)]
cases += [([3, 3], 2, 2), ([1, 5, 1], 0, 1)]
hint = (
    "Blocks come back one sequence at a time. Which one arrived last?\n"
    "While too few are free: the last one that runs gives its blocks."
)
check(my_victims, spec=spec, cases=cases, hint=hint)

# ## In production systems
#
# The paper has both ways, and finds swapping slow with small blocks, as
# many small copies do not fill the bus (Kwon et al. 2023, §7.3). Today's
# vLLM recomputes, and uses host memory for a cache of prefixes.

# ## Next
#
# See it move: `paged-ref viz --at S --frame 3`.
#
# Lesson 15: a context that is larger than the device. Or, now that you have
# all its parts, lesson 21: a paged cache that you write.
