"""Lesson 11: continuous batching

Question: what does a batch do when one of its sequences ends?
Time: 50 minutes. Needs lesson 10.

A step reads all weights, for one token or for many, so sequences run in
batches. But requests ask for different lengths. In a batch that starts and
ends together, each finished sequence waits for the longest.
"""

from dataclasses import replace

from paged_ref import LLM, SamplingParams
from paged_ref.core.engine import scheduler
from paged_ref.core.engine.engine import Engine
from paged_ref.core.engine.sequence import Group, Sequence
from paged_ref.lesson import break_it, build, check, claim
from paged_ref.lesson import predict, show, table, todo
from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.core.memory.paged import PagedManager

# ## Predict
#
# Eight requests for these numbers of new tokens; four can run together. The
# step that computes a prompt also gives the first new token.

NEW = [4, 24, 6, 20, 5, 18, 4, 8]
WIDTH = 4
groups = predict(
    "Steps, if the first four run to their end first?", "steps"
)
joining = predict("Steps, if the next starts when one ends?", "steps")

# ## Run
#
# The same engine, both ways. `on_step` gets what each step computed.

PROMPTS = [[20 + i + 7 * j for j in range(6)] for i in range(8)]


def run(group_size, **options):
    steps, tokens = [], []
    options |= {"backend": "reference", "max_batch_seqs": WIDTH}
    options["on_step"] = lambda record: steps.append(dict(record.chunks))
    llm = LLM("tiny", **options)
    for first in range(0, len(NEW), group_size):
        group = slice(first, first + group_size)
        params = [SamplingParams(n, ignore_eos=True) for n in NEW[group]]
        outputs = llm.generate(PROMPTS[group], params)
        for output in outputs:
            tokens += output.outputs[0].token_ids
    return steps, tokens


# One character for each step of a request:


def picture(title, steps):
    text = f"  {title}: {len(steps)} steps (P prompt, d one more token)\n"
    for seq in range(len(NEW)):
        text += f"  {seq} "
        for step in steps:
            count = step.get(seq, 0)
            text += "P" if count > 1 else "d" if count else "·"
        text += "\n"
    show(text)


in_groups, tokens = run(WIDTH)
continuous, same = run(len(NEW))

picture("in groups", in_groups)
picture("continuous", continuous)
groups.grade(len(in_groups), why="the longest of each four: 24 + 18")
joining.grade(
    len(continuous),
    why="the longest begins in step 1; all others fit in beside it",
)

claim("no token changes", same, tokens)
idle = [WIDTH * len(steps) - sum(NEW) for steps in (in_groups, continuous)]
places = f"idle places: {idle[0]} in groups, {idle[1]} continuous"
claim(places, idle[1] < idle[0])

# One rule plans all this: **a sequence runs until its computed tokens catch
# up with its tokens**. A new prompt is many tokens behind, a running
# sequence one. A step has a budget of tokens; a long prompt takes what is
# left of the budget, and goes on in the next step. So no running sequence
# waits for a long prompt.

chunked, same = run(len(NEW), max_batch_tokens=8)
four = range(4)
rows = [(i, *(chunked[i].get(seq, "") for seq in four)) for i in range(5)]
columns = ("step", *(f"seq {seq}" for seq in four))
table("Tokens of a step of at most 8", columns, rows)
most = max(sum(step.values()) for step in chunked)
claim("tokens in the fullest step", most, 8)
claim("no token changes", same, tokens)

# ## What must hold
#
# The tokens of a sequence must not depend on the other sequences of a step.
# All new tokens of a step stand in one row. Other arrays say where in this
# row each sequence begins, where its blocks are, and from which token its
# logits come. All of them must name the sequences in the same order.


def in_another_order(real):
    def prepare_inputs(self, plan):
        inputs = real(self, plan)
        return replace(inputs, logits_rows=inputs.logits_rows[::-1])

    return prepare_inputs


break_it(
    "the rows of logits are in another order than their sequences",
    where=(Engine, "prepare_inputs"), bug=in_another_order,
    run=lambda: run(len(NEW))[1][:12], caught_by="contract",
    text=LLM("tiny").tokenizer.decode,
)  # fmt: skip

# No wrong slot was read, so only the tokens show the bug: each request
# alone is the oracle of every batch.

# ## Exercise
#
# Write the rule. `behind` says by how many tokens each sequence is behind,
# the earliest arrival first. Give (sequence, tokens) for the sequences that
# run, in this order, and no more tokens than the budget.


def my_plan(behind, budget):
    return todo("5 lines")


def spec(behind, budget):
    real = scheduler.Scheduler(PagedManager(BlockPool(99), 4), budget, 99)
    for seq, n in enumerate(behind):
        real.add(Group([Sequence(seq, [0] * n, n, n + 1)]))
    return [(seq.seq_id, n) for seq, n in real.schedule().chunks]


cases = [([1, 1, 9], 8), ([9, 1, 1], 8), ([3, 3, 3], 100), ([1] * 5, 3)]
hint = (
    "Keep count of what is left of the budget.\n"
    "Each takes the smaller of `behind` and the budget that is left."
)
check(my_plan, spec=spec, cases=cases, hint=hint)

# Now the whole scheduler, in a file of your own: `my_scheduler.py`. It also
# decides which sequences begin, and which gives way when no block is free
# (lesson 14 returns to this). It runs a trace of requests, and each of its
# steps is compared with the package's plan.

build("my_schedule")

# ## In production systems
#
# Orca (Yu et al. 2022) introduced scheduling by step, and Sarathi-Serve
# (Agrawal et al. 2024) prompts in chunks, so that no decode waits. vLLM
# plans with the one rule above.

# ## Next
#
# See it move: `paged-ref viz --frame 6`, the sequences of each step.
#
# Lesson 12: several continuations of one prompt, which share its blocks.
