"""Lesson 3: the reservation and its waste

Question: how much of the cache holds tokens if each sequence reserves?
Time: 20 minutes. Needs lesson 2.

Deep learning libraries want a tensor in one piece. So serving systems once
gave each sequence one piece of memory for its whole life. The length of an
answer is not known beforehand, so the size of the piece was a guess. What
does a guess cost?
"""

import math  # noqa: F401  (for your answer)

from paged_ref import LLM, SamplingParams
from paged_ref.lesson import break_it, check, claim, plug_in
from paged_ref.lesson import predict, show, table, todo
from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.regions import RegionPool
from paged_ref.core.memory.standard import StandardManager

# ## Predict
#
# The cache has 128 slots, and no sequence may get longer than 40 tokens.
# `max` reserves 40 slots for each. `pow2` rounds the output limit up to a
# power of two, and reserves the prompt and the rounded limit. `exact` knows
# the future: it reserves what the sequence will really use.

SLOTS, LONGEST = 128, 40
PROMPT = "Four score and seven years ago our"  # a token for each word
OUTPUTS = [9, 17, 3, 12, 20, 5, 13, 9, 14, 6, 24, 11]

together = predict("With max, how many sequences run together?")
share = predict("What share of the cache then holds tokens?", "percent")

# ## Run
#
# The same requests under each guess. After each step in which a request
# waited we look at the slots. Which slots are never used is known at the
# end of the run.


def serve(**options):
    records = []
    llm = LLM(
        kv_cache_tokens=SLOTS, max_model_len=LONGEST,
        backend="reference", on_step=records.append, **options,
    )  # fmt: skip
    params = [SamplingParams(n, ignore_eos=True) for n in OUTPUTS]
    done = llm.generate([PROMPT] * len(OUTPUTS), params)
    prompt_len = len(done[0].prompt_token_ids)
    final = {i: prompt_len + n - 1 for i, n in enumerate(OUTPUTS)}
    snapshots = [r.snapshot for r in records if r.num_waiting]
    usages = [snapshot.usage(final) for snapshot in snapshots]
    texts = [request.outputs[0].token_ids for request in done]
    return texts, max(r.num_running for r in records), len(records), usages


def percent(run, part):
    shares = [getattr(usage, part) / usage.total for usage in run[-1]]
    return 100 * sum(shares) / len(shares)


runs = {}
for guess in ("max", "pow2", "exact"):
    runs[guess] = serve(manager="standard", reserve=guess)
runs["paged"] = serve(manager="paged", block_size=4)

parts = ("tokens", "reserved", "internal", "external", "free")
rows = []
for name, run in runs.items():
    cells = [f"{percent(run, part):.1f}" for part in parts]
    rows.append((name, *run[1:3], *cells))
columns = ("", "together", "steps", *parts)
table("Most together, steps, and percent of the cache", columns, rows)
together.grade(runs["max"][1], why=f"{SLOTS} // {LONGEST}")
share.grade(
    percent(runs["max"], "tokens"), within=0.2,
    why="three prompts of 7 tokens, each with half an output: 3 x 13 slots",
)  # fmt: skip

# The first moment of each: a letter is two slots with a prompt, a dot two
# slots that are reserved, a blank two slots of no region.


def strip(guess):
    manager = StandardManager(SLOTS, LONGEST, guess)
    cells = [" "] * SLOTS
    for i, new in enumerate(OUTPUTS):
        try:
            manager.admit(i, range(7), max_len=7 + new)
        except OutOfBlocks:
            break
        (start,) = manager.placement(i)
        size = manager.region_size(7, 7 + new)
        cells[start : start + size] = ("ABCDEFGH"[i] * 7).ljust(size, ".")
    return f"{guess:>5} |{''.join(cells[::2])}|"


show("\n".join(strip(guess) for guess in ("max", "pow2", "exact")))

# **Reserved** slots are empty, and their sequence will use them later.
# **Internal** waste is inside a region and never used. **External** waste
# lies between regions, in holes too small for the next request. On real
# requests the paper found 20.4% to 38.2% of the memory holding tokens (Kwon
# et al. 2023, §1). The last row, `paged`, is the subject of this course.

# ## What must hold
#
# The parts add up to the cache, and how memory is managed changes no text.

usages = [usage for run in runs.values() for usage in run[-1]]
texts = [run[0] for run in runs.values()]
claim("parts add up to", {usage.total for usage in usages}, {SLOTS})
claim("the text is the same", all(text == texts[0] for text in texts))
exact = runs["exact"]
claim("exact wastes nothing inside", percent(exact, "internal"), 0)
claim("and still reserves", percent(exact, "reserved") > 0)

# A region that is given back must be joined to the holes beside it. Without
# joining, the pool crumbles: all slots are free, and no large region fits.


def leaves_crumbs(real):
    def release(self, start, size):
        self.holes = sorted([*self.holes, (start, size)])

    return release


def come_and_go():
    manager = StandardManager(64, 64, "exact")
    for seq_id in range(4):
        manager.admit(seq_id, range(4), max_len=16)
    for seq_id in range(4):
        manager.free(seq_id)
    manager.check_integrity()


break_it(
    "a region that is given back is not joined to the holes beside it",
    where=(RegionPool, "release"), bug=leaves_crumbs, run=come_and_go,
    caught_by="integrity",
)  # fmt: skip

# ## Exercise
#
# How much does `pow2` reserve? The prompt, whose length is known, and for
# the output the smallest power of two that holds it.


def my_pow2_region(prompt_len, max_output):
    """Slots for a prompt and an output of at most `max_output` tokens."""
    return todo("4 lines")


region_size = StandardManager(999, 999, "pow2").region_size


def spec(prompt_len, max_output):
    return region_size(prompt_len, prompt_len + max_output)


cases = [(p, n) for p in (1, 7, 100) for n in (1, 2, 3, 8, 9, 500)]
hint = (
    "Which powers of two are there? Try them from the smallest on.\n"
    "Begin with size = 1, and double it while it is too small."
)
mine = check(my_pow2_region, spec=spec, cases=cases, hint=hint)

where = (StandardManager, "region_size")
with plug_in(where, lambda self, prompt, most: mine(prompt, most - prompt)):
    steps = serve(manager="standard", reserve="pow2")[2]
claim("steps with it, as before", steps, runs["pow2"][2])

# ## In production systems
#
# FasterTransformer and Orca reserved like this. A padded tensor still does.

# ## Next
#
# See it move: `paged-ref viz --manager standard --frame 5`.
#
# Lesson 4: if the regions lie badly, can we move them?
